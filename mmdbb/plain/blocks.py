# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""Make a block start as a plain convolution, with all of its branches alive.

As in DyRep (Huang et al., CVPR 2022, sec. 3.2,
https://arxiv.org/abs/2204.01219), the ``kxk`` branch takes the plain kernel
minus the other branches. Let :math:`K, b` be the kernel and bias that the
block shall equal, :math:`O, o` those of the other branches together, and
:math:`s = \gamma / \sigma` and :math:`\mu` the scale and mean of the norm in
the ``kxk`` branch. Then that branch gets

.. math:: W = (K - O) / s, \quad \beta = b - o + \mu s

In each channel, the gammas of the other branches are a fixed share of the
gamma of the ``kxk`` branch. So :math:`O / s` stays small beside the plain
kernel even where a pretrained gamma is tiny, and the running statistics of the
plain norm are still about right for W. For composed kernels (OREPA) see
:mod:`mmdbb.plain.kernels`.
"""

from __future__ import annotations

import copy
from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.composed import ComposedKernelConv2d
from mmdbb.blocks.offers import NormEntries
from mmdbb.branches.base import leaf_dtype
from mmdbb.plain.branch_sums import (
    NormValues,
    exactly,
    start_sum,
)
from mmdbb.plain.kernels import start_as_
from mmdbb.ports import PORTS
from mmdbb.scale_norm import ScaleNorm
from mmdbb.transforms import KernelBias, bn_scale_shift, fuse_conv_bn

#: Default of ``branch_scale`` in :func:`plain_start`.
BRANCH_SCALE = 0.1


@torch.no_grad()
def plain_start(
    block: ReparamConv2d,
    plain: KernelBias,
    norm: Optional[NormValues] = None,
    absorbed: bool = False,
    branch_scale: float = BRANCH_SCALE,
) -> Dict[str, Tensor]:
    """Compute the entries with which a block equals a plain convolution.

    Args:
        block: A block with a ``kxk`` or ``orepa`` branch, or with a composed
            kernel; unchanged.
        plain: The plain convolution: kernel (out, in / groups, kH, kW) and
            bias (out,).
        norm: The norm behind the plain convolution, if there is one. The norm
            in the ``kxk`` branch starts with its statistics.
        absorbed: Whether the block takes the place of that norm too. If not,
            the norm stays behind the block.
        branch_scale: Start value of the gammas of all other branches, as a
            share of the gamma of the ``kxk`` branch. A smaller share changes
            the output less when training begins: the batch's statistics
            replace the initial ones, which may change it by about this share
            for each branch. A larger share lets the other branches learn
            faster. For a composed kernel: size of the sum of the other
            branches, relative to the plain kernel.

    Returns:
        dict: Entries of the block's state dict, for :func:`copy_entries_`.

    Raises:
        ValueError: If the block cannot take the plain kernel, shapes differ
            or the result is not finite.
    """
    _check(block, plain, branch_scale)
    if absorbed and norm is not None and _only_scales(block):
        raise ValueError(
            'a block with shift=False has no place for the mean and bias of '
            'the norm that it would take the place of'
        )
    work: Any = copy.deepcopy(block).cpu()
    plain = KernelBias(*(t.detach().cpu().double() for t in plain))
    plain = block.in_torchs_layout(plain)
    wanted = _with_norm(plain, norm if absorbed else None)
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
def start_offered(
    block: ReparamConv2d, plain: KernelBias, norm: Optional[NormEntries]
) -> Dict[str, Tensor]:
    """Compute the start of a block to which a state dict offers plain weights.

    Args:
        block: The block, merged or not; unchanged.
        plain: The plain convolution. Its bias is None where the weights have
            none.
        norm: The norm that the block absorbed, if its entries are known. What
            is missing of them is as in a new norm. If there are none, but a
            bias, the convolution is a merged one, which holds the norm.

    Raises:
        ValueError: If the block cannot start so.
    """
    values, is_merged = None, plain.bias is not None
    if plain.bias is None:
        zeros = plain.kernel.new_zeros(block.out_channels)
        plain = plain._replace(bias=zeros)
    if norm is not None:
        one = torch.ones_like(plain.bias)
        found = norm.entries
        is_merged = is_merged and not found
        # With the variance 1 - eps a norm computes the identity.
        var = exactly(one) - norm.eps if is_merged else one
        values = NormValues(
            found.get('running_mean', 0 * one),
            found.get('running_var', var),
            found.get('weight'),
            found.get('bias'),
            norm.eps,
            found.get('num_batches_tracked'),
        )
    if any(t.is_meta for t in (*block.parameters(), *block.buffers())):
        raise ValueError('it is on the meta device, where it has no values')
    if not block.deploy:
        return plain_start(block, plain, values, values is not None)
    layout = block.in_torchs_layout
    exact = layout(KernelBias(*map(exactly, plain)))
    wanted = layout(_with_norm(exact, values))
    if block.reparam_conv.bias is None:
        if wanted.bias.any():
            raise ValueError('the plain convolution has a bias, it has none')
        return {'reparam_conv.weight': wanted.kernel}
    return {f'reparam_conv.{n}': v for n, v in zip(('weight', 'bias'), wanted)}


PORTS.start_plain = start_offered


def _with_norm(plain: KernelBias, norm: Optional[NormValues]) -> KernelBias:
    """A plain convolution, in float64, and the norm behind it as one."""
    if norm is None:
        return plain
    scale_shift = bn_scale_shift(
        exactly(norm.mean),
        exactly(norm.var),
        exactly(norm.weight),
        exactly(norm.bias),
        norm.eps,
    )
    return fuse_conv_bn(plain, scale_shift)


@torch.no_grad()
def copy_entries_(module: nn.Module, entries: Dict[str, Tensor]) -> None:
    """Copy entries into a module's parameters and buffers, in place.

    The parameters stay the same objects, because an optimizer, and mmengine's
    record of initialisation, refer to them.

    Args:
        module: The module to fill.
        entries: Names in its state dict -> values.
    """
    state = module.state_dict(keep_vars=True)
    for name, value in entries.items():
        state[name].copy_(value)


def _start_composed(
    work: ComposedKernelConv2d, wanted: KernelBias, branch_scale: float
) -> nn.Module:
    """Start a block with a composed kernel, in float64, and return it."""
    dtype = leaf_dtype(work)
    exact = work.double()
    if exact.own_bias is not None:
        exact.own_bias.copy_(wanted.bias)
    elif wanted.bias.any():
        raise ValueError('the plain convolution has a bias, the block none')
    start_as_(exact.generator, wanted.kernel, branch_scale, dtype)
    return exact


def _only_scales(block: nn.Module) -> bool:
    branches = getattr(block, 'branches', {}).values()
    return any(isinstance(b.last_norm, ScaleNorm) for b in branches)


def _check(
    block: ReparamConv2d, plain: KernelBias, branch_scale: float
) -> None:
    is_sum = isinstance(block, BranchSumConv2d)
    if not is_sum and not isinstance(block, ComposedKernelConv2d):
        raise ValueError(
            f'{type(block).__name__} has neither branches nor a composed '
            'kernel, and cannot start as a plain convolution'
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
    if tuple(plain.kernel.shape) != block.spec.weight_shape:
        raise ValueError(
            f'the plain kernel has shape {tuple(plain.kernel.shape)}, the '
            f'block needs {block.spec.weight_shape}'
        )
    if not branch_scale > 0:
        raise ValueError(
            'branch_scale must be greater than 0, or the other branches '
            f'would not learn; got {branch_scale!r}'
        )
