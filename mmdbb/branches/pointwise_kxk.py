# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branch ``1x1_kxk``: a 1x1, a norm, a KxK, a norm (DBB paper, sec. 3.3).

The 1x1 starts as the identity, if it has as many channels out as in.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.base import Branch, fuse_kernel_norm, take_geometry
from mmdbb.branches.norm import norm_then_pad, run_norm
from mmdbb.geometry import ConvSpec
from mmdbb.kernels.base import check_internal_channels
from mmdbb.registry import BRANCHES
from mmdbb.transforms import (
    KernelBias,
    fuse_1x1_kxk,
    identity_kernel,
)


@BRANCHES.register_module(name='1x1_kxk')
class PointwiseKxK(Branch):
    """A 1x1 and a KxK convolution in sequence, with a norm after each.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norms, ``dict(type='BN')`` if None.
        internal_channels: Channels between the two convolutions. By default
            as many as the input has; twice as many in a depthwise block.

    Raises:
        ValueError: If ``internal_channels`` is not a positive multiple of the
            groups.
    """

    def __init__(
        self,
        spec: ConvSpec,
        norm_cfg: Optional[dict] = None,
        internal_channels: Optional[int] = None,
    ) -> None:
        super().__init__(spec, norm_cfg)
        if internal_channels is None:
            internal_channels = spec.in_channels * (1 + spec.is_depthwise)
        check_internal_channels(internal_channels, spec)
        self.norm1 = self._norm(internal_channels)
        self.norm2 = self._norm(spec.out_channels)
        if internal_channels == spec.in_channels:
            self.conv1 = IdentityConv1x1(internal_channels, spec.groups)
        else:
            self.conv1 = nn.Conv2d(
                spec.in_channels,
                internal_channels,
                1,
                groups=spec.groups,
                bias=False,
            )
        self.conv2 = nn.Conv2d(
            internal_channels,
            spec.out_channels,
            spec.kernel_size,
            spec.stride,
            0,
            spec.dilation,
            spec.groups,
            bias=False,
        )

    def set_spec(self, spec: ConvSpec) -> None:
        """See :meth:`Branch.set_spec`."""
        super().set_spec(spec)
        geometry = dict(stride=spec.stride, dilation=spec.dilation)
        take_geometry(self.conv2, geometry)

    @property
    def last_norm(self) -> _BatchNorm:
        return self.norm2

    @property
    def kernel1(self) -> Tensor:
        """The 1x1 kernel, (internal, in / groups, 1, 1)."""
        if isinstance(self.conv1, IdentityConv1x1):
            return self.conv1.kernel
        return self.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        x = norm_then_pad(self.norm1, self.conv1(x), self.spec)
        return run_norm(self.norm2, self.conv2(x))

    def equivalent_kernel_bias(self) -> KernelBias:
        first = fuse_kernel_norm(self.kernel1, self.norm1)
        second = fuse_kernel_norm(self.conv2.weight, self.norm2)
        return fuse_1x1_kxk(first, second, self.spec.groups)


def mask_kernel(kernel: Tensor, value: Tensor, groups: int) -> Tensor:
    """Reduce a kernel for images that are a mask times a value per channel.

    On the border all channels have one mask, so a convolution of the mask
    alone, one channel, gives the same output for less work.

    Args:
        kernel: Kernel for all channels, shape (out, in / groups, kH, kW).
        value: Value of each channel where the mask is one, shape (in,).
        groups: Number of groups of the convolution.

    Returns:
        Tensor: Kernel for the mask, shape (out, 1, kH, kW).
    """
    inner, *size = kernel.shape[1:]
    rows = torch.einsum(
        'gomhw,gm->gohw',
        kernel.reshape(groups, -1, inner, *size),
        value.reshape(groups, inner),
    )
    return rows.reshape(-1, 1, *size)


class IdentityConv1x1(nn.Module):
    """A 1x1 convolution whose kernel is the identity plus a weight.

    The weight starts at zero. As in the paper's code, weight decay pulls it
    back to zero, so the kernel to the identity. This is not an ``nn.Conv2d``,
    so that rules which initialise convolutions do not touch it.

    Args:
        channels: Number of channels, in and out.
        groups: Number of groups.
    """

    # OpenMMLab packages read these of every layer with "Conv" in its class.
    kernel_size = stride = dilation = (1, 1)
    padding = (0, 0)

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.groups = groups
        self.weight = nn.Parameter(
            torch.empty(channels, channels // groups, 1, 1)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the weight its start, zero."""
        nn.init.zeros_(self.weight)

    @property
    def kernel(self) -> Tensor:
        """Identity plus weight, (channels, channels / groups, 1, 1)."""
        weight = self.weight
        return weight + identity_kernel(
            self.channels, self.groups, weight.dtype, weight.device
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images (N, C, H, W); the shape stays."""
        return F.conv2d(x, self.kernel, groups=self.groups)

    def extra_repr(self) -> str:
        return f'{self.channels}, groups={self.groups}'
