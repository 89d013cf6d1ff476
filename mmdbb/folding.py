# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Fold a batch norm into the convolution before it, in place."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.base import zero_bias
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.modules import is_known
from mmdbb.transforms import KernelBias, fuse_conv_bn


@torch.no_grad()
def fold_norm_(conv: nn.Conv2d, norm: _BatchNorm) -> None:
    """Give a convolution the kernel and bias of itself and its norm.

    Args:
        conv: The convolution; changed, and rounded once.
        norm: The norm, for which :func:`is_foldable` holds; unchanged.
    """
    bias = zero_bias(conv.weight) if conv.bias is None else conv.bias
    exact = KernelBias(conv.weight.double(), bias.double())
    fused = fuse_conv_bn(exact, norm_scale_shift(copy.deepcopy(norm).double()))
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(fused.kernel.to(dtype))
    conv.bias = nn.Parameter(fused.bias.to(dtype))


def is_foldable(norm: object) -> bool:
    """Whether a norm is one scale and one shift for each channel.

    Args:
        norm: The module that reads a convolution's output, or None.
    """
    return (
        isinstance(norm, _BatchNorm)
        and is_known(norm)
        and norm.running_mean is not None
    )
