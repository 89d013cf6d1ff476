# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""How much each branch of a block contributes to the merged kernel.

A block merges into the sum of its branches' kernels. The norm of each of them
beside the norm of the sum, and the angles between them, say how much of the
kernel a branch supplies once trained. They leave out the branches' biases: to
take out a branch with a small share may change the output a lot, unless what
it adds is folded into the others (:mod:`mmdbb.drop_branches`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict

import torch
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d, refuse_merged
from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.composed import ComposedKernelConv2d
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.kernels import KxKKernel, PointwiseKernel
from mmdbb.modules import cast, fresh_weights, tensors_of
from mmdbb.recompute import without_autocast
from mmdbb.reparam import find_blocks

__all__ = ['BlockShares', 'BranchShare', 'branch_shares', 'model_shares']

#: Composed kernels that are sums -> names of the rows of their ``scale``.
_ROWS = {
    KxKKernel: ('kxk', '1x1_avg', '1x1_prior', '1x1_kxk', '1x1', 'separable'),
    PointwiseKernel: ('1x1', '1x1_1x1'),
}


@dataclass(frozen=True)
class BranchShare:
    """What one branch adds to its block's merged kernel.

    Attributes:
        norm: Length of the branch's kernel (Frobenius norm), at the block's
            full kernel size, with all norms of the branch fused into it.
        share: ``norm`` divided by the length of the merged kernel: how far
            the merged kernel moves, relative to its length, if the branch is
            left out. Shares do not add up to 1, because branches point in
            different directions; one above 1 is cancelled by others.
        projection: The part of the merged kernel that the branch supplies in
            the merged kernel's own direction. The projections of a block's
            branches add up to 1; one of a branch that others cancel is
            negative.
        cosines: The other branches' names -> cosine of the angle between the
            two kernels, from -1 to 1; NaN where one of them is zero.
    """

    norm: float
    share: float
    projection: float
    cosines: Dict[str, float]


@dataclass(frozen=True)
class BlockShares:
    """The lengths of a block's kernels.

    Attributes:
        norm: Length of the merged kernel (Frobenius norm).
        branches: Names of the branches -> what each adds.
    """

    norm: float
    branches: Dict[str, BranchShare]


def branch_shares(block: ReparamConv2d) -> BlockShares:
    """Measure what each branch of a block adds to its merged kernel.

    The kernels are those of eval mode: the norms' running statistics are
    fused into them. All numbers are computed in float64, on the CPU. If the
    merged kernel is zero, the shares of branches are infinite or NaN.

    Args:
        block: A block that is not merged; unchanged.

    Returns:
        BlockShares: The branches in the block's order. Of OREPA's blocks the
        branches of the composed kernel. A block that is no sum, such as
        OREPA's stack, has one, named ``kernel``.

    Raises:
        TypeError: If ``block`` is not a block.
        ValueError: If it is merged or on the device ``meta``, or a hook
            inside may change its output.

    Examples:
        >>> from mmdbb import DBB
        >>> shares = branch_shares(DBB(4, 8, 3, branches=['kxk', '1x1']))
        >>> sorted(shares.branches)
        ['1x1', 'kxk']
        >>> round(sum(b.projection for b in shares.branches.values()), 6)
        1.0
    """
    kernels = branch_kernels(block)
    flat = {name: kernel.flatten() for name, kernel in kernels.items()}
    merged: Any = sum(flat.values())
    norms = {name: float(kernel.norm()) for name, kernel in flat.items()}
    norm = float(merged.norm())
    branches = {}
    for name, kernel in flat.items():
        length = norms[name]
        branches[name] = BranchShare(
            norm=length,
            share=_ratio(length, norm),
            projection=_ratio(float(kernel @ merged), norm**2),
            cosines={
                other: _ratio(float(kernel @ value), length * norms[other])
                for other, value in flat.items()
                if other != name
            },
        )
    return BlockShares(norm, branches)


def model_shares(model: nn.Module) -> Dict[str, BlockShares]:
    """Measure the branches of all blocks of a model that are not merged.

    Args:
        model: The model; unchanged.

    Returns:
        dict: Name of each block -> its :class:`BlockShares`. A block under
        several names is listed under the first.

    Raises:
        ValueError: If a block's branches cannot be merged, see
            :func:`branch_shares`; the message names the block.
    """
    blocks: Dict[str, ReparamConv2d] = {}
    for name, block in find_blocks(model).items():
        if not block.deploy and block not in blocks.values():
            blocks[name] = block
    found = {}
    for name, block in blocks.items():
        try:
            found[name] = branch_shares(block)
        except ValueError as error:
            raise ValueError(f'{name or "the model"}: {error}') from error
    return found


@torch.no_grad()
def branch_kernels(block: ReparamConv2d) -> Dict[str, Tensor]:
    """The kernels whose sum is a block's merged kernel, in eval mode.

    Args:
        block: A block that is not merged; unchanged.

    Returns:
        dict: Name of each branch -> kernel of the merged kernel's shape,
        (out, in / groups, kH, kW), in float64, on the CPU. A norm behind the
        sum is fused into each.

    Raises:
        TypeError: If ``block`` is not a block.
        ValueError: If it is merged or on the device ``meta``, or a hook
            inside may change its output.
    """
    if not isinstance(block, ReparamConv2d):
        raise TypeError(
            f'block must be a block of mmdbb, got a {type(block).__name__}'
        )
    refuse_merged(block, 'branches to measure')
    if any(tensor.is_meta for tensor in tensors_of(block)):
        raise ValueError('it is on the meta device, where it has no values')
    copied = cast(block, 'cpu', torch.float64)
    with fresh_weights(copied), without_autocast(torch.device('cpu')):
        if isinstance(copied, BranchSumConv2d):
            return _of_sum(copied)
        generator: Any = getattr(copied, 'generator', None)
        if hasattr(generator, 'branch_kernels'):
            return generator.branch_kernels()
        rows = _rows_of(copied)
        if not rows:
            return {'kernel': copied.get_equivalent_kernel_bias().kernel}
        kernels, scales = {}, generator.scale
        for i, name in enumerate(rows):
            # The kernel is linear in its scales. The copy may share them with
            # the block, so they are replaced and not written to.
            alone = torch.zeros_like(scales)
            alone[i] = scales[i]
            vars(generator)['scale'] = alone
            kernels[name] = generator.compose()
        return kernels


def _of_sum(block: BranchSumConv2d) -> Dict[str, Tensor]:
    kernels = {}
    for name, branch in block.branches.items():
        branch.refuse_changed_geometry()
        kernels[name] = block.kernel_bias_of(branch).kernel
    if block.norm is None:
        return kernels
    scale = norm_scale_shift(block.norm).scale
    return {
        name: kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1))
        for name, kernel in kernels.items()
    }


def _rows_of(block: ReparamConv2d) -> tuple:
    if not isinstance(block, ComposedKernelConv2d):
        return ()
    names = _ROWS.get(type(block.generator), ())
    if getattr(block.generator, 'pointwise', True) is None:
        names = tuple(name for name in names if name != '1x1')
    return names


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else math.nan
