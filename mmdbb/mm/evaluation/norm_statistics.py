# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Set the statistics of batch norms from data, without changing outputs."""

from __future__ import annotations

import functools
from typing import Dict, NamedTuple

import torch
from torch import Tensor, nn

from mmdbb.compare import network_outputs
from mmdbb.dimensions import NORM_TYPES
from mmdbb.modules import is_known

_BATCH = 32


class ChannelStatistics(NamedTuple):
    """Mean and variance over all pixels of all images, in float64.

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
    """Compute the mean and variance of modules' outputs, or of their inputs.

    Args:
        model: A network, in eval mode.
        modules: Some of its modules by name. Their inputs and outputs are of
            shape (N, C, H, W).
        images: Normalised images (N, C, H, W).
        of_input: True for the inputs of the modules, False for the outputs.

    Returns:
        dict: Name -> statistics, for the modules that run on the images.
    """
    sums = {}

    def watch(name: str, module: nn.Module, args, output: Tensor) -> None:
        x = (args[0] if of_input else output).detach().double()
        over = (0, *range(2, x.dim()))
        terms = (
            x.new_tensor(x.numel() / x.shape[1]),
            x.sum(over),
            x.square().sum(over),
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
    """Give batch norms the statistics of data, and adapt weight and bias.

    The outputs in eval mode stay the same, because weight and bias make up
    for the new mean and variance. A merged network has norms that were added
    only to hold a bias; their running statistics have nothing to do with
    their input. In training mode a norm uses the statistics of its input, so
    without this step the first step of training would change all outputs.
    Norms without running statistics, or with a forward of their own, stay as
    they are.

    Args:
        model: A network, in eval mode. Its norms are changed in place.
        images: Normalised images (N, C, H, W).
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*NORM_TYPES.values(), nn.SyncBatchNorm))
        and module.affine
        and module.running_mean is not None
        and is_known(module)
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
