# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Make a sum of branches start as a plain convolution, all branches alive.

See :mod:`mmdbb.plain.blocks` for the equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.branches.base import leaf_dtype
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.plain.kernels import start_as_
from mmdbb.scale_norm import ScaleNorm
from mmdbb.transforms import KernelBias, add_branches, unfuse_conv_bn

# The least gamma of a channel that the plain network switched off, so that the
# channel can learn again: a thousandth of a common gamma, too small to add
# noise in training.
SMALLEST_GAMMA = 1e-3


class NormValues(NamedTuple):
    """Parameters and statistics of a batch norm, each of shape (channels,).

    Attributes:
        mean: Running mean.
        var: Running variance.
        weight: Gamma; None means 1.
        bias: Beta; None means 0.
        eps: Added to the variance.
        count: ``num_batches_tracked``, one number; None if not known.
    """

    mean: Tensor
    var: Tensor
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    eps: float
    # A tuple has a method of this name, which nobody calls.
    count: Optional[Tensor] = None  # type: ignore[assignment]

    @classmethod
    def of(cls, norm: _BatchNorm) -> NormValues:
        """Read them from a norm that keeps running statistics."""
        own: Any = norm
        return cls(
            own.running_mean,
            own.running_var,
            norm.weight,
            norm.bias,
            norm.eps,
            norm.num_batches_tracked,
        )


def start_sum(
    work: BranchSumConv2d,
    plain: KernelBias,
    wanted: KernelBias,
    norm: Optional[NormValues],
    absorbed: bool,
    branch_scale: float,
) -> nn.Module:
    """Start a sum of branches as a plain convolution, in place.

    Args:
        work: The block; it is overwritten, and in float64 afterwards.
        plain: The plain convolution: kernel (out, in / groups, kH, kW) and
            bias (out,), in float64.
        wanted: The convolution that the block shall equal, in float64. It is
            ``plain``, with ``norm`` fused if the block absorbs that.
        norm: The norm behind the plain convolution, if there is one.
        absorbed: Whether the block absorbs that norm.
        branch_scale: Start value of the gammas of all branches but the one
            with the plain kernel, as a share of that one's gamma.

    Returns:
        nn.Module: The block.

    Raises:
        ValueError: If the block has no place for a bias.
    """
    dtype = leaf_dtype(work)
    key: Any = work.dense_branch
    dense: Any = work.branches[key]
    others = [b for b in work.branches.values() if b is not dense]
    start = dense.norm
    values = _start_of_norm(plain, norm, absorbed, start.eps)
    # The plain bias is missing in the mean of the branch's convolution.
    mean = values.mean - plain.bias
    if isinstance(start, ScaleNorm):
        values = _about_zero(values, mean, start.eps)
        mean = 0 * mean
    start.running_mean.copy_(mean)
    start.running_var.copy_(values.var)
    if values.count is not None:
        start.num_batches_tracked.copy_(values.count)
    gamma = torch.ones_like(values.var)
    if start.affine:
        known: Any = values.weight  # never None at the start
        gamma = _alive(known)
        start.weight.copy_(gamma)
    if start.bias is not None:
        start.bias.zero_()
    for other in others:
        if other.last_norm is not None and other.last_norm.affine:
            other.last_norm.weight.copy_(branch_scale * gamma.abs())

    # Gammas have been rounded to the block's dtype; all else is exact.
    exact = work.double()
    rest = add_branches(
        wanted, *(_negative(b.equivalent_kernel_bias()) for b in others)
    )
    scale_shift = norm_scale_shift(start)
    kernel = unfuse_conv_bn(rest, scale_shift).kernel
    shift = rest.bias - scale_shift.shift
    if hasattr(dense, 'generator'):
        start_as_(dense.generator, kernel, branch_scale, dtype)
    else:
        weight = KernelBias(kernel, shift)
        dense.conv.weight.copy_(work.in_torchs_layout(weight).kernel)
    if start.bias is not None:
        start.bias.copy_(shift)
    elif exact.own_bias is not None:
        exact.own_bias.copy_(shift)
    elif isinstance(start, ScaleNorm):
        if shift.any():
            raise ValueError(
                'the plain convolution has a bias, the block with shift=False '
                'none'
            )
    else:
        start.running_mean.copy_(-rest.bias / scale_shift.scale)
    return exact


@overload
def exactly(value: Tensor) -> Tensor: ...


@overload
def exactly(value: Optional[Tensor]) -> Optional[Tensor]: ...


def exactly(value: Optional[Tensor]) -> Optional[Tensor]:
    """Copy a value to the CPU in float64; None stays None."""
    return None if value is None else value.detach().cpu().double()


def _start_of_norm(
    plain: KernelBias,
    norm: Optional[NormValues],
    absorbed: bool,
    eps: float,
) -> NormValues:
    """Start values of the norm in the branch with the plain kernel.

    Args:
        plain: The plain convolution, in float64.
        norm: The norm behind it, if there is one.
        absorbed: Whether the block absorbs that norm.
        eps: Added to the variance by the branch's norm.

    Returns:
        NormValues: In float64.
    """
    one = torch.ones_like(plain.bias)
    if norm is None:
        return NormValues(plain.bias, one, one, 0 * one, 0.0)
    mean, var = exactly(norm.mean), exactly(norm.var)
    weight, bias = exactly(norm.weight), exactly(norm.bias)
    values = NormValues(mean, var, weight, bias, norm.eps, norm.count)
    if absorbed:
        return values._replace(weight=one if weight is None else weight)
    # This norm undoes itself, in training mode too, so that the norm behind
    # the block gets the same input as in the plain network.
    return values._replace(weight=(var + eps).sqrt(), bias=mean)


def _about_zero(values: NormValues, mean: Tensor, eps: float) -> NormValues:
    """Start values of a norm without shift, which divides by the mean square.

    Args:
        values: Those of the norm that would undo itself with a shift. Without
            a norm behind the plain convolution nothing is known of its output.
        mean: Mean of the branch's convolution.
        eps: Added to the mean square by the branch's norm.
    """
    square = values.var + mean.square()
    return values._replace(var=square, weight=(square + eps).sqrt())


def _alive(gamma: Tensor) -> Tensor:
    sign = torch.where(gamma < 0, -1.0, 1.0)
    return sign * gamma.abs().clamp_min(SMALLEST_GAMMA)


def _negative(branch: KernelBias) -> KernelBias:
    return KernelBias(-branch.kernel, -branch.bias)
