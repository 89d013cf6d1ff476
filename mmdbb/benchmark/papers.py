# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The papers' way to compute what mmdbb computes, to compare with."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdbb.blocks import BranchSumConv2d
from mmdbb.branches import PointwiseKxK
from mmdbb.kernels import KxKKernel, PointwiseKernel
from mmdbb.reparam import find_blocks
from mmdbb.transforms import pad_kernel


@contextlib.contextmanager
def papers_way(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context, a model computes as the papers' code does.

    Branch sums run their branches one by one; a composed kernel is composed
    branch by branch, each scaled after it has its full size.

    Args:
        model: A model with blocks.
    """
    changed = []

    def override(module: nn.Module, name: str, function) -> None:
        setattr(module, name, function)
        changed.append((module, name))

    for block in find_blocks(model).values():
        if isinstance(block, BranchSumConv2d) and not block.deploy:
            override(block, 'forward_train', block.forward_branches)
    for kernel in model.modules():
        if isinstance(kernel, KxKKernel):
            override(kernel, 'compose', lambda k=kernel: _kxk_kernel(k))
        elif isinstance(kernel, PointwiseKernel):
            override(kernel, 'compose', lambda k=kernel: _1x1_kernel(k))
    try:
        yield model
    finally:
        for module, name in changed:
            vars(module).pop(name, None)


def _kxk_kernel(kernel: KxKKernel) -> Tensor:
    """OREPA paper's code, OREPA.weight_gen."""
    spec = kernel.spec
    out, inside, *size = spec.kernel_shape
    scales = list(kernel.scale)
    branches = [
        kernel.origin,
        torch.einsum('oi,hw->oihw', kernel.avg.flatten(1), kernel.avg_pattern),
        torch.einsum(
            'oi,ohw->oihw', kernel.prior.flatten(1), kernel.prior_pattern
        ),
        _sequence(kernel.inner1 + kernel.identity, kernel.inner2, spec.groups),
    ]
    if kernel.pointwise is not None:
        branches.append(pad_kernel(kernel.pointwise, size, spec.centre))
    wide = kernel.depthwise.reshape(spec.groups, inside, -1, *size)
    rows = kernel.separable.reshape(-1, spec.groups, inside, wide.shape[2])
    branches.append(
        torch.einsum('githw,ogit->goihw', wide, rows).reshape(
            out, inside, *size
        )
    )
    total = None
    for scale, branch in zip(scales, branches):
        scaled = torch.einsum('oihw,o->oihw', branch, scale)
        total = scaled if total is None else total + scaled
    return total


def _1x1_kernel(kernel: PointwiseKernel) -> Tensor:
    """OREPA paper's code, OREPA_1x1.weight_gen."""
    origin, inner = kernel.scale
    sequence = _sequence(kernel.inner1, kernel.inner2, kernel.spec.groups)
    return torch.einsum('oihw,o->oihw', kernel.origin, origin) + torch.einsum(
        'oihw,o->oihw', sequence, inner
    )


def _sequence(first: Tensor, second: Tensor, groups: int) -> Tensor:
    mid, inside = first.shape[:2]
    rows = second.reshape(groups, -1, mid // groups, *second.shape[2:])
    return torch.einsum(
        'gti,gothw->goihw', first.reshape(groups, -1, inside), rows
    ).reshape(-1, inside, *second.shape[2:])


@torch.no_grad()
def merge_group_by_group(model: nn.Module) -> None:
    """Compose each block's kernel with a loop over groups for the 1x1-KxK.

    For comparison: a merge as in the papers' code, where a grouped
    convolution's product of kernels is taken one group after the other.
    """
    for block in find_blocks(model).values():
        block.get_equivalent_kernel_bias()
        if not isinstance(block, BranchSumConv2d):
            continue
        for branch in block.branches.values():
            if not isinstance(branch, PointwiseKxK):
                continue
            groups = branch.spec.groups
            products = [
                F.conv2d(second, first.permute(1, 0, 2, 3))
                for first, second in zip(
                    branch.kernel1.chunk(groups),
                    branch.conv2.weight.chunk(groups),
                )
            ]
            torch.cat(products)
