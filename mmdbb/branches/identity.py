# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branch ``identity``: a norm alone.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, sec.
3.3 (https://arxiv.org/abs/2101.03697).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.base import Branch, fuse_kernel_norm
from mmdbb.branches.norm import run_norm
from mmdbb.geometry import ConvSpec, pad_images
from mmdbb.registry import BRANCHES
from mmdbb.transforms import KernelBias, identity_kernel, pad_kernel


@BRANCHES.register_module(name='identity')
class Identity(Branch):
    """The block's input, through a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether there is a norm. Without one the branch returns its
            input.
    """

    requirement = 'stride 1 and as many channels out as in'

    def __init__(
        self,
        spec: ConvSpec,
        norm_cfg: Optional[dict] = None,
        norm: bool = True,
    ) -> None:
        super().__init__(spec, norm_cfg)
        self.norm = self._norm(spec.out_channels) if norm else None

    @classmethod
    def supports(cls, spec: ConvSpec) -> bool:
        return not spec.is_strided and spec.in_channels == spec.out_channels

    @property
    def last_norm(self) -> Optional[_BatchNorm]:
        return self.norm

    def forward(self, x: Tensor) -> Tensor:
        # Zero where the block pads so that the image keeps its size.
        pads = self.spec.pads_of((1,) * self.spec.dims)
        x = pad_images(x, pads, self.spec.padding_mode)
        return x if self.norm is None else run_norm(self.norm, x)

    def equivalent_kernel_bias(self) -> KernelBias:
        spec, norm = self.spec, self.norm
        like: Any = torch.empty(0) if norm is None else norm.running_mean
        eye = identity_kernel(
            spec.in_channels,
            spec.groups,
            like.dtype,
            like.device,
            spec.dims,
        )
        kernel, bias = fuse_kernel_norm(eye, norm)
        return KernelBias(
            pad_kernel(kernel, spec.kernel_size, spec.centre), bias
        )
