# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The base of blocks with a composed kernel (OREPA, CVPR 2022, sec. 3.2).

Such a block runs one convolution in training too. Its branches are branches of
the kernel, which is composed in every forward pass.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from mmdbb.blocks.base import ReparamConv2d, refuse_merged
from mmdbb.blocks.kernel_cache import cached_kernel, can_keep
from mmdbb.branches.base import zero_bias
from mmdbb.dimensions import per_channel
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

    The paper's blocks end in a norm. Here the network puts it behind the
    block, as behind any convolution.

    The composed kernel is the attribute ``generator``: names in checkpoints
    hold this word.

    Args:
        build_kernel: Builds the composed kernel for a geometry.
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        single_init: Whether the original kernel starts with scale 1 and all
            other branches with 0.
        kwargs: Arguments of ``nn.Conv2d`` as keywords, and ``deploy`` and
            ``init_cfg`` of :class:`ReparamConv2d`.

    Shape:
        - Input: (N, in_channels, H, W)
        - Output: (N, out_channels, H', W'), H' and W' as in ``nn.Conv2d``
    """

    _has_shift = False

    def __init__(
        self,
        build_kernel: Callable[[ConvSpec], ComposedKernel],
        /,
        *args,
        single_init: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.deploy:
            return
        self._starts_single = single_init
        self.generator = build_kernel(self.spec)
        self._add_own_bias(self._wants_bias)
        self._apply_init_cfg()

    def _apply_init_cfg(self) -> None:
        super()._apply_init_cfg()
        if self._starts_single:
            self.single_init()

    def set_spec(self, spec: ConvSpec) -> None:
        """See :meth:`ReparamConv2d.set_spec`."""
        super().set_spec(spec)
        if not self.deploy:
            self.generator.spec = spec

    def _take_size(self, spec: ConvSpec) -> None:
        self.generator.spec = spec

    def forward_train(self, x: Tensor) -> Tensor:
        """Run one convolution, with a kernel composed now or cached.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: Shape (N, out, H', W').
        """
        needs_grad = torch.is_grad_enabled() and any(
            t.requires_grad for t in tensors_of(self)
        )
        if (
            needs_grad
            or is_recording()
            or is_transformed()
            or is_watched(self)
            or not can_keep(x.device)
        ):
            kernel, bias = self.generator(), self.own_bias
        else:
            compose = self.get_equivalent_kernel_bias
            kernel, bias = cached_kernel(self, compose)
        half = autocast_dtype(x.device.type)
        if half is None or torch.float64 in (x.dtype, kernel.dtype):
            return convolve(x, kernel, bias, self.spec)
        with without_autocast(x.device):
            return convolve(x.to(half), kernel, bias, self.spec)

    def forward_branches(self, x: Tensor) -> Tensor:
        """Run each branch of the kernel on the images, and sum the outputs.

        No kernel is composed, so this is a reference for :meth:`forward`.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: Shape (N, out, H', W').
        """
        generator = self.at_size_of(x).generator
        with fresh_weights(generator, refuse=False):
            y = generator.forward_branches(x)
        if self.own_bias is not None:
            y = y + per_channel(self.own_bias.to(y.dtype), self.dims)
        return y

    def _compose(self) -> KernelBias:
        kernel, bias = self.generator(), self.own_bias
        if bias is None:
            bias = zero_bias(kernel)
        return KernelBias(kernel, bias)

    def init_gamma(self, value: float) -> None:
        """Set the scales of all branches of the kernel to one value.

        Args:
            value: The value of each scale.

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
        self.generator.init_gamma(value)

    def single_init(self) -> None:
        """Give the original kernel scale 1, and all other branches 0.

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
        self.generator.single_init()
