# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The plain convolution of a geometry: what a block is once merged."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mmdbb.dimensions import CONV_TYPES
from mmdbb.geometry import ConvSpec, adaptive_pads, pad2d


def plain_conv(spec: ConvSpec, bias: bool, **factory) -> _ConvNd:
    """Build the plain convolution of a geometry.

    Args:
        spec: The geometry.
        bias: Whether it has a bias.
        factory: ``device`` and ``dtype``, as ``nn.Conv2d`` takes them.

    Returns:
        nn.Module: An ``nn.Conv2d`` itself, or torch's convolution of another
        kind if the geometry says so; where the pads depend on the image, an
        :class:`AdaptiveConv2d`.
    """
    adaptive = spec.padding == 'adaptive'
    conv: Any = AdaptiveConv2d if adaptive else CONV_TYPES[spec.kind]
    return conv(**spec.conv_args, bias=bias, **factory)


class AdaptiveConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` that pads each image as its size needs.

    It computes what mmcv's ``Conv2dAdaptivePadding`` and timm's
    ``Conv2dSame`` do, and has the same entries, those of ``nn.Conv2d``. torch
    has no such layer.

    Examples:
        >>> import torch
        >>> conv = AdaptiveConv2d(3, 4, 3, stride=2)
        >>> conv(torch.rand(1, 3, 8, 9)).shape
        torch.Size([1, 4, 4, 5])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images: (N, in, H, W) to (N, out, H / s, W / s), up."""
        pads = adaptive_pads(
            x.shape[-2:], self.kernel_size, self.stride, self.dilation
        )
        return F.conv2d(
            pad2d(x, pads),
            self.weight,
            self.bias,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )
