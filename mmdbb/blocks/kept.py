# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A composed kernel, kept between forward passes and never stale."""

from __future__ import annotations

from typing import List, NamedTuple

import torch
from torch import Tensor, nn

from mmdbb.transforms import KernelBias


class KeptKernel(NamedTuple):
    """A composed kernel and the values it was composed of.

    Attributes:
        tensors: Copies of the block's parameters and buffers.
        merged: The kernel and bias.
    """

    tensors: List[Tensor]
    merged: KernelBias


def kept_kernel(block: nn.Module) -> KernelBias:
    """The composed kernel, kept as long as all values stay the same.

    Values are compared, not version counters: optimizers and averaging hooks
    write through ``.data``, which no counter sees.

    Args:
        block: A ``ReparamConv2d`` that is not merged.
    """
    tensors = [*block.parameters(), *block.buffers()]
    kept = block._kept_kernel
    if (
        kept is None
        or len(kept.tensors) != len(tensors)
        or not all(
            a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(kept.tensors, tensors)
        )
    ):
        # What inference mode makes no backward pass could use later.
        with torch.inference_mode(False), torch.no_grad():
            copies = [t.detach().clone() for t in tensors]
            merged = block.get_equivalent_kernel_bias()
            kept = block._kept_kernel = KeptKernel(copies, merged)
    return kept.merged
