# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branch ``1x1_avg``: a 1x1, a norm, average pooling, a norm.

DBB paper, sec. 3.3. In a depthwise block a 1x1 would only scale the channels,
so there, as in the paper's code, the branch is pooling and one norm.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.base import Branch, fuse_kernel_norm, zero_bias
from mmdbb.branches.norm import norm_scale_shift, norm_then_pad, run_norm
from mmdbb.dimensions import AVG_POOL, CONV
from mmdbb.geometry import ConvSpec, pad_images
from mmdbb.registry import BRANCHES
from mmdbb.transforms import (
    KernelBias,
    avg_pool_kernel,
    fuse_1x1_avg,
    fuse_conv_bn,
    identity_kernel,
)


@BRANCHES.register_module(name='1x1_avg')
class PointwiseAvg(Branch):
    """A 1x1 convolution, then average pooling, with a norm after each.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norms, ``dict(type='BN')`` if None.
    """

    requirement = 'a kernel larger than 1x1, not transposed'

    def __init__(
        self, spec: ConvSpec, norm_cfg: Optional[dict] = None
    ) -> None:
        super().__init__(spec, norm_cfg)
        if not spec.is_depthwise:
            self.norm1 = self._norm(spec.out_channels)
        self.norm2 = self._norm(spec.out_channels)
        if not spec.is_depthwise:
            self.conv1 = self._pointwise(spec.out_channels)

    @classmethod
    def supports(cls, spec: ConvSpec) -> bool:
        return not (spec.is_pointwise or spec.transposed)

    @property
    def last_norm(self) -> _BatchNorm:
        return self.norm2

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if spec.is_depthwise:
            x = pad_images(x, spec.pads, spec.padding_mode)
        else:
            x = norm_then_pad(self.norm1, self.conv1(x), spec)
        return run_norm(self.norm2, self._pool(x))

    def _pool(self, x: Tensor) -> Tensor:
        spec = self.spec
        if not spec.is_dilated:
            y = AVG_POOL[spec.dims](x, spec.kernel_size, spec.stride)
            # Autocast on CPUs pools volumes in float32.
            return y.to(x.dtype)
        channels = spec.out_channels
        kernel = avg_pool_kernel(
            channels, spec.kernel_size, channels, x.dtype, x.device
        )
        return CONV[spec.dims](
            x,
            kernel,
            stride=spec.stride,
            dilation=spec.dilation,
            groups=channels,
        )

    def equivalent_kernel_bias(self) -> KernelBias:
        spec = self.spec
        norm = norm_scale_shift(self.norm2)
        if spec.is_depthwise:
            kernel = identity_kernel(
                spec.in_channels,
                spec.groups,
                norm.scale.dtype,
                norm.scale.device,
                spec.dims,
            )
            first = KernelBias(kernel, zero_bias(kernel))
        else:
            first = fuse_kernel_norm(self.conv1.weight, self.norm1)
        # A scale per channel commutes with pooling, so the norm is fused into
        # the 1x1, which is smaller.
        return fuse_1x1_avg(fuse_conv_bn(first, norm), spec.kernel_size)
