# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""A block that starts as a given plain convolution, every branch alive.

As in DyRep (Huang et al., CVPR 2022, sec. 3.2,
https://arxiv.org/abs/2204.01219) the ``kxk`` branch takes what the other
branches leave of the plain kernel. With :math:`K, b` the function wanted,
:math:`O, o` the sum of the other branches, and :math:`s = \gamma / \sigma`
and :math:`\mu` of the branch's norm,

.. math:: W = (K - O) / s, \quad \beta = b - o + \mu s

The gammas of the other branches are a share of the gamma beside them, channel
by channel. So :math:`O / s` is a share of the plain kernel's own scale, also
where a pretrained gamma is tiny, and the statistics of the plain norm stay
about right for W. A composed kernel (OREPA) starts as
:mod:`mmdbb.plain.kernels` says.
"""

from __future__ import annotations

import copy
from typing import Dict, Optional

import torch
from torch import Tensor, nn

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.composed import ComposedKernelConv2d
from mmdbb.branches.base import leaf_dtype
from mmdbb.plain.branch_sums import (
    NormValues,
    exactly,
    start_sum,
)
from mmdbb.plain.kernels import start_as_
from mmdbb.transforms import KernelBias, bn_scale_shift, fuse_conv_bn

#: Default of ``branch_scale``, see :func:`plain_start`.
BRANCH_SCALE = 0.1


@torch.no_grad()
def plain_start(
    block: nn.Module,
    plain: KernelBias,
    norm: Optional[NormValues] = None,
    absorbed: bool = False,
    branch_scale: float = BRANCH_SCALE,
) -> Dict[str, Tensor]:
    """What to load into a block so that in eval mode it is a plain conv.

    Args:
        block: A block with a ``kxk`` or ``orepa`` branch, or of composed
            kernels; unchanged.
        plain: The plain convolution: kernel (out, in / groups, kH, kW) and
            bias (out,).
        norm: The norm that follows the plain convolution, if one does. Its
            statistics are those that the ``kxk`` branch's norm starts with.
        absorbed: Whether the block stands for that norm as well; else it
            stays behind the block.
        branch_scale: Start of the gammas of all other branches, as a share of
            the ``kxk`` branch's gamma. In training mode branches are
            normalised by the batch and not by what they start with, which
            changes the output by up to about this share for each branch. On
            the other hand a branch's kernel learns the slower the smaller its
            gamma is. Of a composed kernel, what its other branches add up to
            as a share of the plain kernel.

    Returns:
        dict: Entries of the block's state dict, for :func:`copy_entries_`.

    Raises:
        ValueError: If the block cannot take the plain kernel, shapes differ
            or the result is not finite.
    """
    _check(block, plain, branch_scale)
    work = copy.deepcopy(block).cpu()
    plain = KernelBias(*(t.detach().cpu().double() for t in plain))
    wanted = plain
    if absorbed and norm is not None:
        scale_shift = bn_scale_shift(
            *(exactly(value) for value in norm[:4]), norm.eps
        )
        wanted = fuse_conv_bn(plain, scale_shift)
    if isinstance(work, ComposedKernelConv2d):
        exact = _start_composed(work, wanted, branch_scale)
    else:
        exact = start_sum(work, plain, wanted, norm, absorbed, branch_scale)
    before = block.state_dict()
    entries = {
        name: value
        for name, value in exact.state_dict().items()
        if not torch.equal(value, before[name].cpu().to(value.dtype))
    }
    strange = [n for n, value in entries.items() if not value.isfinite().all()]
    if strange:
        raise ValueError(
            f'{strange[0]} would not be finite: the plain convolution or its '
            'norm has a value that is NaN or infinite, or a negative variance'
        )
    return entries


@torch.no_grad()
def copy_entries_(module: nn.Module, entries: Dict[str, Tensor]) -> None:
    """Copy entries into a module's parameters and buffers, in place.

    Parameters stay the same objects, as mmengine's record of what
    initialised them and an optimizer need.
    """
    state = module.state_dict(keep_vars=True)
    for name, value in entries.items():
        state[name].copy_(value)


def _start_composed(
    work: ComposedKernelConv2d, wanted: KernelBias, branch_scale: float
) -> nn.Module:
    """The block in float64, started."""
    dtype = leaf_dtype(work)
    exact = work.double()
    if exact.bias is not None:
        exact.bias.copy_(wanted.bias)
    elif wanted.bias.any():
        raise ValueError('the plain convolution has a bias, the block none')
    start_as_(exact.generator, wanted.kernel, branch_scale, dtype)
    return exact


def _check(block: nn.Module, plain: KernelBias, branch_scale: float) -> None:
    is_sum = isinstance(block, BranchSumConv2d)
    if not is_sum and not isinstance(block, ComposedKernelConv2d):
        raise ValueError(
            f'{type(block).__name__} is neither a sum of branches nor of '
            'composed kernels, and cannot start as a plain convolution'
        )
    if block.deploy:
        raise ValueError('the block is merged already')
    if is_sum and block.dense_branch is None:
        raise ValueError(
            "the block has no 'kxk' branch (nor 'orepa'), which would take "
            f'the plain kernel; it has {list(block.branches)}. Add one to '
            'branches'
        )
    if getattr(block, 'norm', None) is not None:
        raise ValueError(
            'a block with a norm after its sum cannot start as a plain '
            f'convolution; {type(block).__name__} has one (sum_norm=True)'
        )
    if tuple(plain.kernel.shape) != block.spec.kernel_shape:
        raise ValueError(
            f'the plain kernel has shape {tuple(plain.kernel.shape)}, the '
            f'block needs {block.spec.kernel_shape}'
        )
    if not branch_scale > 0:
        raise ValueError(
            'branch_scale must be greater than 0, or the other branches '
            f'would not learn; got {branch_scale!r}'
        )
