# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The papers' way to compute what mmdbb computes, to compare with."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdbb.blocks import BranchSumConv2d, ReparamConv2d
from mmdbb.branches import Branch, PointwiseAvg, PointwiseKxK
from mmdbb.branches.base import fuse_kernel_norm
from mmdbb.kernels import KxKKernel, PointwiseKernel
from mmdbb.reparam import find_blocks
from mmdbb.transforms import (
    KernelBias,
    add_branches,
    avg_pool_kernel,
    pad_kernel,
)


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
        else:
            continue
        override(kernel, '_composes_again', False)
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
    """Compose each block's kernel as the DBB paper's code does.

    There the product of two kernels is taken one group after the other, that
    with an average pooling's kernel too, in the parameters' own precision
    (``transIII_1x1_kxk`` in its ``dbb_transforms.py``).
    """
    for block in find_blocks(model).values():
        merged_block(block)


def merged_block(block: ReparamConv2d) -> KernelBias:
    """One block's kernel, the products of kernels group by group."""
    if not isinstance(block, BranchSumConv2d) or block.norm is not None:
        return block.get_equivalent_kernel_bias()
    return add_branches(*map(_merged_branch, block.branches.values()))


def _merged_branch(branch: Branch) -> KernelBias:
    spec = branch.spec
    if isinstance(branch, PointwiseKxK):
        first, second = branch.kernel1, branch.conv2.weight
    elif isinstance(branch, PointwiseAvg) and not spec.is_depthwise:
        first = branch.conv1.weight
        second = avg_pool_kernel(
            spec.out_channels,
            spec.kernel_size,
            spec.groups,
            first.dtype,
            first.device,
        )
    else:
        return branch.equivalent_kernel_bias()
    first = fuse_kernel_norm(first, branch.norm1)
    second = fuse_kernel_norm(second, branch.norm2)
    kernels, biases = [], []
    for k1, b1, k2, b2 in zip(
        *(t.chunk(spec.groups) for t in (*first, *second))
    ):
        kernels.append(F.conv2d(k2, k1.permute(1, 0, 2, 3)))
        biases.append((k2 * b1.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b2)
    return KernelBias(torch.cat(kernels), torch.cat(biases))
