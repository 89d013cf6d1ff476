# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A cache for a block's merged kernel, which is never stale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor

from mmdbb.modules import tensors_of
from mmdbb.transforms import KernelBias

if TYPE_CHECKING:
    from mmdbb.blocks.base import ReparamConv2d


class KeptKernel(NamedTuple):
    """A merged kernel, and copies of what it was composed from.

    Attributes:
        structure: Modules, geometry and eps, see :func:`_structure_of`.
        values: Copies of the block's parameters and buffers, see
            :func:`_values_of`.
        merged: The kernel and bias.
    """

    structure: list
    values: List[Tensor]
    merged: KernelBias


def can_keep(device: torch.device) -> bool:
    """Whether kernels are kept on a device.

    To compare values the CPU has to wait for a GPU, which it cannot do while a
    CUDA graph is captured.

    Args:
        device: The block's device.
    """
    if device.type == 'cuda':
        return not torch.cuda.is_current_stream_capturing()
    return device.type == 'cpu'


def cached_kernel(
    block: ReparamConv2d, compose: Callable[[], KernelBias]
) -> KernelBias:
    """Compose a block's kernel, or return the last one if nothing changed.

    All values are compared. Version counters would be cheaper, but optimizers
    and averaging hooks write through ``.data``, which does not count.

    Args:
        block: A ``ReparamConv2d`` that is not merged.
        compose: Composes the kernel and bias.
    """
    # A tensor made in inference mode could not be used in a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        tensors = list(tensors_of(block))
        values, structure = _values_of(tensors), _structure_of(block, tensors)
        kept: Optional[KeptKernel] = block._cached_kernel
        if (
            kept is None
            or kept.structure != structure
            or len(kept.values) != len(values)
            or not all(
                a.dtype == b.dtype and torch.equal(a, b)
                for a, b in zip(kept.values, values)
            )
        ):
            copies = [value.detach().clone() for value in values]
            kept = KeptKernel(structure, copies, compose())
            block._cached_kernel = kept
    return kept.merged


def _values_of(tensors: List[Tensor]) -> List[Tensor]:
    """Those of a block's tensors that a kernel depends on.

    On a GPU there is one tensor for each dtype, because each comparison waits
    for the GPU. Whole numbers are left out: they only count batches.
    """
    tensors = [t for t in tensors if t.is_floating_point()]
    if not tensors or tensors[0].device.type == 'cpu':
        return tensors
    by_dtype: Dict[torch.dtype, List[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.flatten())
    return [torch.cat(group) for group in by_dtype.values()]


def _structure_of(block: ReparamConv2d, tensors: List[Tensor]) -> list:
    """All that a kernel depends on besides tensors: modules, geometry, eps.

    The shapes count as well, because tensors may be compared as one.
    """
    modules = block.named_modules()
    return [
        block.spec,
        *((name, type(m), getattr(m, 'eps', None)) for name, m in modules),
        *(tensor.shape for tensor in tensors),
    ]
