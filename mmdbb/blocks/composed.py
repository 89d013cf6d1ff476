# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A convolution whose one kernel is composed at every forward pass.

The OREPA family (CVPR 2022, sec. 3.2): an image meets one convolution in
training too; what is diverse is how its kernel comes about.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d, refuse_merged
from mmdbb.blocks.kernel_cache import cached_kernel
from mmdbb.branches.base import zero_bias
from mmdbb.geometry import ConvSpec, convolve
from mmdbb.kernels import ComposedKernel
from mmdbb.modules import fresh_weights, is_watched, tensors_of
from mmdbb.recompute import (
    autocast_dtype,
    is_recording,
    is_transformed,
    without_autocast,
)
from mmdbb.transforms import KernelBias


class ComposedKernelConv2d(ReparamConv2d):
    """A convolution with a composed kernel, and no norm.

    The norm that the paper's blocks end in is the host's, which follows.

    Args:
        generator: Builds from the geometry what composes the kernel.
        args: As :class:`ReparamConv2d`, keywords too.
        single_init: Whether only the original kernel starts with a scale
            other than zero.

    Shape:
        - Input: (N, in_channels, H, W)
        - Output: (N, out_channels, H', W') as of ``nn.Conv2d``
    """

    _has_shift = False

    def __init__(
        self,
        generator: Callable[[ConvSpec], ComposedKernel],
        /,
        *args,
        single_init: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.deploy:
            return
        self.generator = generator(self.spec)
        self.register_parameter(
            'bias',
            nn.Parameter(torch.zeros(self.out_channels))
            if self._wants_bias
            else None,
        )
        self._apply_init_cfg()
        if single_init:
            self.single_init()

    def set_spec(self, spec: ConvSpec) -> None:
        """See :meth:`ReparamConv2d.set_spec`."""
        super().set_spec(spec)
        if not self.deploy:
            self.generator.spec = spec

    def forward_train(self, x: Tensor) -> Tensor:
        """One convolution with the kernel composed now."""
        needs_grad = torch.is_grad_enabled() and any(
            t.requires_grad for t in tensors_of(self)
        )
        if (
            needs_grad
            or x.device.type != 'cpu'
            or is_recording()
            or is_transformed()
            or is_watched(self)
        ):
            kernel, bias = self.generator(), self.bias
        else:
            compose = self.get_equivalent_kernel_bias
            kernel, bias = cached_kernel(self, compose)
        half = autocast_dtype(x.device.type)
        if half is None or torch.float64 in (x.dtype, kernel.dtype):
            return convolve(x, kernel, bias, self.spec)
        with without_autocast(x.device):
            return convolve(x.to(half), kernel, bias, self.spec)

    def forward_branches(self, x: Tensor) -> Tensor:
        """The branches of the kernel on images, summed: a reference.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: Shape (N, out, H', W').
        """
        with fresh_weights(self, refuse=False):
            y = self.generator.forward_branches(x)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).reshape(-1, 1, 1)
        return y

    def _compose(self) -> KernelBias:
        kernel, bias = self.generator(), self.bias
        if bias is None:
            bias = zero_bias(kernel)
        return KernelBias(kernel, bias)

    def init_gamma(self, value: float) -> None:
        """Set all scales of the kernel's branches.

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
        self.generator.init_gamma(value)

    def single_init(self) -> None:
        """Start as the original kernel alone.

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
        self.generator.single_init()
