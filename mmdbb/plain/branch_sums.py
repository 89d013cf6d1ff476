# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""How a sum of branches starts as a plain convolution.

See :mod:`mmdbb.plain.blocks` for the equations.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.branches.base import leaf_dtype
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.plain.kernels import start_as_
from mmdbb.transforms import KernelBias, add_branches, unfuse_conv_bn

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


def start_sum(
    work: BranchSumConv2d,
    plain: KernelBias,
    wanted: KernelBias,
    norm: Optional[NormValues],
    absorbed: bool,
    branch_scale: float,
) -> nn.Module:
    """A block that sums branches, in float64 and started.

    Args:
        work: The block; it is overwritten.
        plain: As of :func:`plain_start`, in float64.
        wanted: What the block shall compute.
        norm: As of :func:`plain_start`.
        absorbed: As of :func:`plain_start`.
        branch_scale: As of :func:`plain_start`.
    """
    dtype = leaf_dtype(work)
    dense = work.branches[work.dense_branch]
    others = [b for b in work.branches.values() if b is not dense]
    values = _start_of_norm(plain, norm, absorbed, dense.norm.eps)
    start = dense.norm
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
    kernel = unfuse_conv_bn(rest, scale_shift).kernel
    if hasattr(dense, 'generator'):
        start_as_(dense.generator, kernel, branch_scale, dtype)
    else:
        dense.conv.weight.copy_(kernel)
    shift = rest.bias - scale_shift.shift
    if start.affine:
        start.bias.copy_(shift)
    elif exact.bias is not None:
        exact.bias.copy_(shift)
    else:
        start.running_mean.copy_(-rest.bias / scale_shift.scale)
    return exact


def exactly(value: Optional[Tensor]) -> Optional[Tensor]:
    """A value on the CPU in float64."""
    return None if value is None else value.detach().cpu().double()


def _start_of_norm(
    plain: KernelBias,
    norm: Optional[NormValues],
    absorbed: bool,
    eps: float,
) -> NormValues:
    """What the norm of the dense branch starts from, in float64.

    ``eps`` is that of the branch's norm.
    """
    one = torch.ones_like(plain.bias)
    if norm is None:
        return NormValues(plain.bias, one, one, 0 * one, 0.0)
    mean, var, weight, bias = (exactly(value) for value in norm[:4])
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
