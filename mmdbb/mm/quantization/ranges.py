# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Predict what INT8 does to merged kernels, before anything is quantized.

The integers of a channel are spread evenly over its range, so one large weight
makes the steps coarse for all others. The report shows how wide the ranges
are, how much channels differ, which branch the largest weights come from, and
the ratio of signal to rounding noise that results.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.conv_norms import norm_names
from mmdbb.errors import UserError
from mmdbb.mm.quantization.fake import own_layers, quantizable_layers
from mmdbb.modules import is_known
from mmdbb.own_forward import own_forwards
from mmdbb.ranges import weight_range
from mmdbb.shares import branch_kernels


class KernelRange(NamedTuple):
    """Ranges of one layer's kernel, blocks merged and norms folded.

    Attributes:
        name: Name of the layer.
        kind: Class of the layer, such as ``DBB`` or ``Conv2d``.
        low: Smallest weight.
        high: Largest weight.
        outliers: Share of the weights beyond :data:`mmdbb.ranges.OUTLIER`
            standard deviations.
        spread: Range of the widest output channel, divided by the median
            range.
        branches: Branch -> its share, by magnitude, in the largest weight of
            a channel; the mean over all channels. Empty for plain layers.
        snr: Ratio of signal to rounding noise in decibels, with one scale a
            channel.
        snr_per_tensor: The same ratio with one scale for the kernel.
        channels: Largest magnitude in each output channel.
    """

    name: str
    kind: str
    low: float
    high: float
    outliers: float
    spread: float
    branches: Dict[str, float]
    snr: float
    snr_per_tensor: float
    channels: List[float]


@torch.no_grad()
def kernel_ranges(model: nn.Module) -> List[KernelRange]:
    """Report on the kernels of all layers that can be quantized.

    The log names convolutions whose kernel is not their weight, because their
    forward is their own. The report leaves them out.

    Args:
        model: A network, with blocks or merged. Kernels are taken with the
            batch norms behind them folded in.

    Returns:
        list: One entry for each layer, in the network's order.

    Raises:
        UserError: If the network has no such layer, or a kernel is not
            finite.
    """
    left = own_layers(model)
    if left:
        print_log(f'left out of the report, {own_forwards(left)}', 'current')
    norms = norm_names(model)
    found = []
    for name, layer in quantizable_layers(model).items():
        behind = norms.get(name, ())
        norm = model.get_submodule(behind[0]) if len(behind) == 1 else None
        if not (isinstance(norm, _BatchNorm) and is_known(norm)):
            norm = None
        found.append(_kernel_range(name, layer, norm))
    if not found:
        raise UserError(
            f'{type(model).__name__} has no block, convolution or linear '
            'layer to report on'
        )
    return found


def _kernel_range(
    name: str, layer: nn.Module, norm: Optional[nn.Module]
) -> KernelRange:
    if isinstance(layer, ReparamConv2d):
        kernel = layer.get_equivalent_kernel_bias().kernel
    else:
        kernel = layer.weight
    scale = _scale(norm, kernel)
    kernel = kernel.double() * scale
    if not kernel.isfinite().all():
        raise UserError(f'the kernel of {name} is not finite')
    found = weight_range(kernel)._asdict()
    shares = _shares(layer, kernel, scale)
    return KernelRange(name, type(layer).__name__, branches=shares, **found)


def _scale(norm: Optional[nn.Module], kernel: Tensor) -> Tensor:
    """Factors of the norm for the output channels, shaped like the kernel."""
    shape = (-1, *[1] * (kernel.dim() - 1))
    ones = kernel.new_ones(kernel.shape[0], dtype=torch.float64)
    if norm is None:
        return ones.reshape(shape)
    return norm_scale_shift(norm).scale.double().reshape(shape)


def _shares(
    layer: nn.Module, kernel: Tensor, scale: Tensor
) -> Dict[str, float]:
    """Mean share of each branch in the largest weights of the channels."""
    if not isinstance(layer, BranchSumConv2d) or layer.deploy:
        return {}
    place = kernel.abs().flatten(1).argmax(1, keepdim=True)
    parts = {
        branch: part.to(kernel).mul(scale).flatten(1).gather(1, place).abs()
        for branch, part in branch_kernels(layer).items()
    }
    total = sum(parts.values()).clamp_min(1e-300)
    return {n: (part / total).mean().item() for n, part in parts.items()}
