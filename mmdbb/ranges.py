# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Ranges of a kernel, and what rounding it to INT8 does to it.

The integers of a channel are spread evenly over its range, so one large weight
makes the steps coarse for all others.
"""

from __future__ import annotations

import math
from typing import List, NamedTuple

import torch
from torch import Tensor

#: A weight larger than this many standard deviations of its kernel is an
#: outlier.
OUTLIER = 6.0
#: Largest integer of a weight in INT8; the smallest is its negative.
LIMIT = 127


class WeightRange(NamedTuple):
    """Ranges of one kernel.

    Attributes:
        low: Smallest weight.
        high: Largest weight.
        outliers: Share of the weights beyond :data:`OUTLIER` standard
            deviations.
        spread: Range of the widest output channel, divided by the median
            range.
        snr: Ratio of signal to rounding noise in decibels, with one scale a
            channel.
        snr_per_tensor: The same ratio with one scale for the kernel.
        channels: Largest magnitude in each output channel.
    """

    low: float
    high: float
    outliers: float
    spread: float
    snr: float
    snr_per_tensor: float
    channels: List[float]


@torch.no_grad()
def weight_range(kernel: Tensor) -> WeightRange:
    """Measure the ranges of a kernel.

    Args:
        kernel: The kernel, with all norms folded in: (out, in / groups, ...)
            or (out, in), finite.
    """
    kernel = kernel.double()
    sizes = kernel.abs().flatten(1).amax(1)
    spread = sizes.max() / sizes.median().clamp_min(1e-300)
    deviation = kernel.std(correction=0).clamp_min(1e-300)
    outliers = (kernel.abs() > OUTLIER * deviation).double().mean()
    return WeightRange(
        kernel.min().item(),
        kernel.max().item(),
        outliers.item(),
        spread.item(),
        signal_to_noise(kernel),
        signal_to_noise(kernel, per_channel=False),
        sizes.tolist(),
    )


def signal_to_noise(kernel: Tensor, per_channel: bool = True) -> float:
    """Compare a kernel's energy with the energy of its error in INT8.

    Args:
        kernel: The kernel, (out, in / groups, kH, kW) or (out, in).
        per_channel: Whether each output channel has a scale of its own.

    Returns:
        float: The ratio in decibels; infinite if rounding changes nothing.

    Examples:
        >>> signal_to_noise(torch.tensor([[1.0, 0.5, 0.25]])) > 40
        True
    """
    sizes = kernel.abs()
    if per_channel:
        largest = sizes.flatten(1).amax(1)
        largest = largest.reshape(-1, *[1] * (kernel.dim() - 1))
        # As torch's quantizers: no step is finer than this.
        step = (largest / LIMIT).clamp_min(torch.finfo(torch.float32).eps)
    else:
        step = sizes.max().clamp_min(1e-300) / LIMIT
    rounded = (kernel / step).round().clamp(-LIMIT, LIMIT) * step
    noise = (kernel - rounded).square().sum().item()
    signal = kernel.square().sum().item()
    if not noise or not signal:
        return math.inf
    return 10 * math.log10(signal / noise)
