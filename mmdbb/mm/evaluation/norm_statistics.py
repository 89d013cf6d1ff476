# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Batch norms with the statistics of data, which at first change nothing."""

from __future__ import annotations

import functools
from typing import Dict, NamedTuple

import torch
from torch import Tensor, nn

from mmdbb.compare import network_outputs

_BATCH = 32


class ChannelStatistics(NamedTuple):
    """Mean and variance over the pixels of all images, in float64.

    Attributes:
        mean: Mean of each channel, shape (channels,).
        var: Biased variance of each channel, shape (channels,).
    """

    mean: Tensor
    var: Tensor


@torch.no_grad()
def channel_statistics(
    model: nn.Module,
    modules: Dict[str, nn.Module],
    images: Tensor,
    of_input: bool = False,
) -> Dict[str, ChannelStatistics]:
    """Mean and variance of what modules return, or of what they are given.

    Args:
        model: A network, in eval mode.
        modules: Some of its modules by name, which map (N, C, H, W) to the
            like.
        images: Normalised images (N, C, H, W).
        of_input: Whether to look at their inputs.

    Returns:
        dict: Of the modules that the images reach.
    """
    sums = {}

    def watch(name: str, module: nn.Module, args, output: Tensor) -> None:
        x = (args[0] if of_input else output).detach().double()
        terms = (
            x.new_tensor(x.numel() / x.shape[1]),
            x.sum((0, 2, 3)),
            x.square().sum((0, 2, 3)),
        )
        before = sums.get(name, (0, 0, 0))
        sums[name] = tuple(a + b for a, b in zip(before, terms))

    hooks = [
        module.register_forward_hook(functools.partial(watch, name))
        for name, module in modules.items()
    ]
    try:
        for batch in images.split(_BATCH):
            network_outputs(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, (count, first, second) in sums.items():
        mean = first / count
        var = (second / count - mean.square()).clamp_min(0)
        found[name] = ChannelStatistics(mean, var)
    return found


@torch.no_grad()
def calibrate_norms_(model: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of data, and undo them by the weights.

    In eval mode nothing changes. But a norm that a merged network got to
    hold a bias knows nothing of its input, and would change everything once
    it is trained.

    Args:
        model: A network, in eval mode.
        images: Normalised images (N, C, H, W).
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
        and module.affine
    }
    found = channel_statistics(model, norms, images, of_input=True)
    for name, (mean, var) in found.items():
        norm = norms[name]
        scale = (
            norm.weight.double()
            / (norm.running_var.double() + norm.eps).sqrt()
        )
        moved = mean - norm.running_mean.double()
        norm.bias.add_(scale * moved)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        deviation = (norm.running_var.double() + norm.eps).sqrt()
        norm.weight.copy_(scale * deviation)
