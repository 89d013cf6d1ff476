# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run a network of OpenMMLab's packages to see where its data flows."""

from __future__ import annotations

from typing import Any, Tuple

import torch
from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.compare import network_outputs
from mmdbb.dimensions import CONVS
from mmdbb.found_norms import FoundNorms, find_norms
from mmdbb.modules import tensors_of
from mmdbb.running import CannotRun

#: Height and width of the image in pixels, large enough for most networks.
IMAGE_SIZE = (224, 224)
#: Frames of a video, or slices of a volume: enough for most networks too.
FRAMES = 8


def norms_of(
    model: nn.Module, image_size: Tuple[int, int] = IMAGE_SIZE
) -> FoundNorms:
    """Find the norms behind all convolutions and blocks of a network.

    Args:
        model: A classifier, detector, segmentor, a part of one, or any module
            that maps images to tensors; unchanged. It runs in eval mode.
        image_size: Height and width of the random image in pixels.
    """
    return find_norms(model, lambda: run_on_image(model, image_size))


def run_on_image(
    model: nn.Module, image_size: Tuple[int, int] = IMAGE_SIZE
) -> Any:
    """Run a network on a random image, with the random state left alone.

    Args:
        model: The network. It runs in the mode that it is in.
        image_size: Height and width of the image in pixels.

    Returns:
        Features, and the outputs of the dense heads that can be run on them.
    """
    tensor = next(tensors_of(model), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    shape = (1, *image_shape(model, channels_of(model), image_size))
    image = torch.rand(shape, generator=generator).to(tensor.device)
    if tensor.is_floating_point():
        image = image.to(tensor.dtype)
    devices = [tensor.device] if tensor.is_cuda else []
    with torch.random.fork_rng(devices):
        try:
            return network_outputs(model, image)
        except CannotRun as error:
            if hasattr(model, 'extract_feat'):
                raise error.__cause__ from None  # its own words
            raise


def image_shape(
    model: nn.Module, channels: int, image_size: Tuple[int, int]
) -> Tuple[int, ...]:
    """Shape of one image that a network takes.

    Args:
        model: The network. Its first convolution or block reads the images.
        channels: Number of channels of the images.
        image_size: Height and width in pixels.

    Returns:
        tuple: (C, H, W); for a network of videos or volumes (C, T, H, W) with
        :data:`FRAMES` frames, for one of lines (C, W).
    """
    sizes = {1: image_size[1:], 3: (FRAMES, *image_size)}
    for module in model.modules():
        if isinstance(module, (*CONVS, ReparamConv2d)):
            dims = len(module.kernel_size)
            return (channels, *sizes.get(dims, image_size))
    return (channels, *image_size)


def channels_of(model: nn.Module) -> int:
    """Number of channels of the images that a network takes.

    Args:
        model: The network. Its first convolution or block reads the images;
            without any, they have three channels. The ``Focus`` of YOLOX
            makes four channels of each before its convolution reads them.
    """
    convs, pixels = (*CONVS, ReparamConv2d), 1
    for module in model.modules():
        if type(module).__name__ == 'Focus':
            pixels = 4
        if isinstance(module, convs):
            return module.in_channels // pixels
    return 3
