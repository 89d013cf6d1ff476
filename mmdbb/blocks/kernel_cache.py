# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A cache for a block's merged kernel, which is never stale."""

from __future__ import annotations

from typing import Callable, List, NamedTuple

import torch
from torch import Tensor, nn

from mmdbb.modules import tensors_of
from mmdbb.transforms import KernelBias


class KeptKernel(NamedTuple):
    """A merged kernel, and copies of what it was composed from.

    Attributes:
        structure: Modules, geometry and eps, see :func:`_structure_of`.
        tensors: Copies of the block's parameters and buffers.
        merged: The kernel and bias.
    """

    structure: list
    tensors: List[Tensor]
    merged: KernelBias


def cached_kernel(
    block: nn.Module, compose: Callable[[], KernelBias]
) -> KernelBias:
    """Compose a block's kernel, or return the last one if nothing changed.

    All values are compared. Version counters would be cheaper, but optimizers
    and averaging hooks write through ``.data``, which does not count.

    Args:
        block: A ``ReparamConv2d`` that is not merged.
        compose: Composes the kernel and bias.
    """
    tensors, structure = list(tensors_of(block)), _structure_of(block)
    kept = block._cached_kernel
    if (
        kept is None
        or kept.structure != structure
        or len(kept.tensors) != len(tensors)
        or not all(
            a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(kept.tensors, tensors)
        )
    ):
        # A tensor made in inference mode could not be used in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            copies = [t.detach().clone() for t in tensors]
            kept = KeptKernel(structure, copies, compose())
            block._cached_kernel = kept
    return kept.merged


def _structure_of(block: nn.Module) -> list:
    """All that a kernel depends on besides tensors: modules, geometry, eps."""
    modules = block.named_modules()
    return [
        block.spec,
        *((name, type(m), getattr(m, 'eps', None)) for name, m in modules),
    ]
