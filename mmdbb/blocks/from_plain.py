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
about right for W.
"""

from __future__ import annotations

import copy
from typing import Dict, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.transforms import (
    KernelBias,
    add_branches,
    bn_scale_shift,
    fuse_conv_bn,
    unfuse_conv_bn,
)

#: Default of ``branch_scale``, see :func:`plain_start`.
BRANCH_SCALE = 0.1

# A channel that the plain network switched off still starts with this gamma,
# a thousandth of a common one: small enough for no visible noise in training.
SMALLEST_GAMMA = 1e-3


class NormValues(NamedTuple):
    """A batch norm's values, each of shape (channels,).

    Attributes:
        mean: Running mean.
        var: Running variance.
        weight: Gamma; None means 1.
        bias: Beta; None means 0.
        eps: Added to the variance.
        count: ``num_batches_tracked``, if known.
    """

    mean: Tensor
    var: Tensor
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    eps: float
    count: Optional[Tensor] = None

    @classmethod
    def of(cls, norm: _BatchNorm) -> NormValues:
        """The values of a norm that keeps running statistics."""
        return cls(
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            norm.eps,
            norm.num_batches_tracked,
        )


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
        block: A block with a ``kxk`` branch; unchanged.
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
            gamma is.

    Returns:
        dict: Entries of the block's state dict, for :func:`copy_entries_`.

    Raises:
        ValueError: If the block has no ``kxk`` branch, shapes differ or the
            result is not finite.
    """
    _check(block, plain, branch_scale)
    work = copy.deepcopy(block).cpu()
    kxk = work.branches['kxk']
    others = [b for name, b in work.branches.items() if name != 'kxk']
    plain = KernelBias(*(t.detach().cpu().double() for t in plain))
    values = _start_of_norm(plain, norm, absorbed, kxk.norm.eps)
    wanted = plain
    if absorbed and norm is not None:
        wanted = fuse_conv_bn(plain, bn_scale_shift(*values[:5]))
    start = kxk.norm
    # The branch's convolution has no bias: its output's mean is lower.
    start.running_mean.copy_(values.mean - plain.bias)
    start.running_var.copy_(values.var)
    if values.count is not None:
        start.num_batches_tracked.copy_(values.count)
    gamma = torch.ones_like(values.var)
    if start.affine:
        gamma = _alive(values.weight)
        start.weight.copy_(gamma)
        start.bias.zero_()
    for other in others:
        if other.last_norm is not None and other.last_norm.affine:
            other.last_norm.weight.copy_(branch_scale * gamma.abs())

    # From here on in float64, with the gammas as the block's dtype has them.
    exact = work.double()
    rest = add_branches(
        wanted, *(_negative(b.equivalent_kernel_bias()) for b in others)
    )
    scale_shift = norm_scale_shift(start)
    kxk.conv.weight.copy_(unfuse_conv_bn(rest, scale_shift).kernel)
    shift = rest.bias - scale_shift.shift
    if start.affine:
        start.bias.copy_(shift)
    elif exact.bias is not None:
        exact.bias.copy_(shift)
    else:
        start.running_mean.copy_(-rest.bias / scale_shift.scale)
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


def _check(block: nn.Module, plain: KernelBias, branch_scale: float) -> None:
    if not isinstance(block, BranchSumConv2d):
        raise ValueError(
            f'{type(block).__name__} is no sum of branches and cannot start '
            'as a plain convolution'
        )
    if block.deploy:
        raise ValueError('the block is merged already')
    if 'kxk' not in block.branches:
        raise ValueError(
            "the block has no 'kxk' branch, which would take the plain "
            f"kernel; it has {list(block.branches)}. Add 'kxk' to branches"
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


def _start_of_norm(
    plain: KernelBias,
    norm: Optional[NormValues],
    absorbed: bool,
    eps: float,
) -> NormValues:
    """What the norm of the ``kxk`` branch starts from, in float64.

    ``eps`` is that of the branch's norm.
    """
    one = torch.ones_like(plain.bias)
    if norm is None:
        return NormValues(plain.bias, one, one, 0 * one, 0.0)
    mean, var, weight, bias = (
        None if value is None else value.detach().cpu().double()
        for value in norm[:4]
    )
    values = NormValues(mean, var, weight, bias, norm.eps, norm.count)
    if absorbed:
        return values._replace(weight=one if weight is None else weight)
    # A norm that changes nothing, in training mode either: the norm behind
    # the block sees what it saw in the plain network.
    return values._replace(weight=(var + eps).sqrt(), bias=mean)


def _alive(gamma: Tensor) -> Tensor:
    sign = torch.where(gamma < 0, -1.0, 1.0)
    return sign * gamma.abs().clamp_min(SMALLEST_GAMMA)


def _negative(branch: KernelBias) -> KernelBias:
    return KernelBias(-branch.kernel, -branch.bias)
