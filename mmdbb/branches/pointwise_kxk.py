# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branch ``1x1_kxk``: a 1x1, a norm, a KxK, a norm (DBB paper, sec. 3.3).

The 1x1 starts as the identity, if it has as many channels out as in.

Before a transposed KxK the first norm only scales. A constant, spread by a
transposed kernel, comes out smaller at the border, and with a stride not the
same from pixel to pixel, so no bias of one convolution is equal to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mmdbb.branches.base import (
    Branch,
    fuse_kernel_norm,
    kernel_of,
    run_conv,
    take_geometry,
)
from mmdbb.branches.norm import build_branch_norm, norm_then_pad, run_norm
from mmdbb.dimensions import CONV, CONV_TYPES
from mmdbb.geometry import ConvSpec, IntPair
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
        self.norm1 = self._first_norm(internal_channels)
        self.norm2 = self._norm(spec.out_channels)
        self.conv1: Union[IdentityConv1x1, _ConvNd]
        if internal_channels == spec.in_channels:
            self.conv1 = IdentityConv1x1(
                internal_channels, spec.groups, spec.dims
            )
        else:
            self.conv1 = self._pointwise(internal_channels)
        self.conv2: _ConvNd = CONV_TYPES[spec.kind](
            internal_channels,
            spec.out_channels,
            spec.kernel_size,
            groups=spec.groups,
            bias=False,
            **self._geometry(spec),
        )

    def _first_norm(self, channels: int) -> _BatchNorm:
        if not self.spec.transposed:
            return self._norm(channels)
        norm_cfg = dict(self.norm_cfg or dict(type='BN'), shift=False)
        return build_branch_norm(norm_cfg, channels, self.spec.dims)

    @staticmethod
    def _geometry(spec: ConvSpec) -> dict:
        """Arguments of the KxK, whose input is padded before."""
        moves = dict(stride=spec.stride, dilation=spec.dilation)
        if not spec.transposed:
            return moves
        padding, extra = spec.padding, spec.output_padding
        return dict(moves, padding=padding, output_padding=extra)

    def take_size(self, spec: ConvSpec) -> None:
        """See :meth:`Branch.take_size`."""
        super().take_size(spec)
        vars(self.conv2).update(self._geometry(spec))  # of a twin

    def set_spec(self, spec: ConvSpec) -> None:
        """See :meth:`Branch.set_spec`."""
        super().set_spec(spec)
        take_geometry(self.conv2, self._geometry(spec))

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
        y = self.conv1(x)
        if self.spec.transposed:
            y = run_norm(self.norm1, y)
        else:
            y = norm_then_pad(self.norm1, y, self.spec)
        return run_norm(self.norm2, run_conv(self.conv2, y))

    def equivalent_kernel_bias(self) -> KernelBias:
        first = fuse_kernel_norm(self.kernel1, self.norm1)
        kernel2 = kernel_of(self.conv2.weight, self.spec)
        second = fuse_kernel_norm(kernel2, self.norm2)
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
        'gom...,gm->go...',
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
        dims: Number of dimensions of the images.
    """

    if TYPE_CHECKING:
        kernel_size: IntPair
        stride: IntPair
        dilation: IntPair
        padding: IntPair

    # OpenMMLab packages read these of all layers with "Conv" in the name. A
    # block that was pickled before there were other dimensions has no others.
    kernel_size = stride = dilation = (1, 1)
    padding, dims = (0, 0), 2

    def __init__(self, channels: int, groups: int = 1, dims: int = 2) -> None:
        super().__init__()
        self.channels = channels
        self.groups = groups
        self.dims = dims
        self.kernel_size = self.stride = self.dilation = (1,) * dims
        self.padding = (0,) * dims
        self.weight = nn.Parameter(
            torch.empty(channels, channels // groups, *self.kernel_size)
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
            self.channels,
            self.groups,
            weight.dtype,
            weight.device,
            self.dims,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images (N, C, H, W); the shape stays."""
        return CONV[self.dims](x, self.kernel, groups=self.groups)

    def extra_repr(self) -> str:
        return f'{self.channels}, groups={self.groups}'
