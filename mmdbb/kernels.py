# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Kernels composed from parameters at every forward pass.

Hu et al., "Online Convolutional Re-parameterization" (OREPA), CVPR 2022, sec.
3.2 and 3.3 (https://arxiv.org/abs/2204.00826). The branches of a block have a
scale each in place of a norm, so that they add up before they meet an image.
Three forms, by the size of the kernel, as in the paper's code.
"""

from __future__ import annotations

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdbb.geometry import ConvSpec
from mmdbb.transforms import (
    add_patterns,
    compose_1x1_kxk,
    compose_separable,
    compose_stack,
    frequency_prior,
)

#: Channels of the depthwise convolution for each channel of the input.
SEPARABLE_EXPANSION = 8


class GeneratedKernel(nn.Module):
    """Base: calling it composes the kernel, (out, in / groups, kH, kW).

    Args:
        spec: Geometry of the convolution.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self) -> Tensor:
        """The kernel, differentiable, in the parameters' own precision."""
        device = next(self.parameters()).device.type
        # Under autocast only the convolution that reads it is in half.
        with torch.autocast(device, enabled=False):
            return self.compose()

    def compose(self) -> Tensor:
        """The kernel."""
        raise NotImplementedError

    @torch.no_grad()
    def init_gamma(self, value: float) -> None:
        """Set all scales of the branches."""
        self.scale.fill_(value)

    @torch.no_grad()
    def single_init(self) -> None:
        """Start as the original kernel alone: scales 1, 0, 0, ..."""
        self.init_gamma(0.0)
        self.scale[0].fill_(1.0)

    def _kernel(self, *shape: int, a: float = 0.0) -> nn.Parameter:
        kernel = nn.Parameter(torch.empty(*shape))
        nn.init.kaiming_uniform_(kernel, a=a)
        return kernel


class KxKKernel(GeneratedKernel):
    """Six branches: the form for kernels below 7x7.

    Their scales, rows of ``scale``: the original kernel; average pooling
    behind a 1x1; the frequency prior behind a 1x1; a 1x1 followed by a KxK;
    a 1x1; a depthwise separable convolution.

    Args:
        spec: Geometry of the convolution.
        internal_channels: Width between the 1x1 and the KxK; by default that
            of the input, and twice that with more than four groups.
        with_1x1: Whether there is a 1x1. RepVGG's block has one of its own.
        weight_init: Factor on the start values of the kernels.
        scale_init: Factor on those of the scales, squared.

    Raises:
        ValueError: If ``internal_channels`` is not a positive multiple of the
            groups.
    """

    scales = (0.25, 0.25, 0.0, 0.5, 1.0, 0.5)

    def __init__(
        self,
        spec: ConvSpec,
        internal_channels: Optional[int] = None,
        with_1x1: bool = True,
        weight_init: float = 1.0,
        scale_init: float = 1.0,
    ) -> None:
        super().__init__(spec)
        if internal_channels is None:
            internal_channels = spec.in_channels * (1 + (spec.groups > 4))
        if (
            not isinstance(internal_channels, int)
            or internal_channels < 1
            or internal_channels % spec.groups
        ):
            raise ValueError(
                'internal_channels must be a positive multiple of groups='
                f'{spec.groups}, got {internal_channels!r}'
            )
        out, inside, *size = spec.kernel_shape
        # RepVGG's blocks start with smaller kernels in the paper's code.
        a = 0.0 if with_1x1 else 1.0
        self.origin = self._kernel(out, inside, *size, a=a)
        self.avg = self._kernel(out, inside, 1, 1, a=a)
        self.prior = self._kernel(out, inside, 1, 1, a=a)
        self.pointwise = None
        if with_1x1:
            self.pointwise = self._kernel(out, inside, 1, 1, a=a)
        # A distance from the identity, as in DBB's branch of this name.
        self.inner1 = nn.Parameter(
            torch.zeros(internal_channels, inside, 1, 1)
        )
        self.inner2 = self._kernel(
            out, internal_channels // spec.groups, *size, a=a
        )
        self.depthwise = self._kernel(
            spec.in_channels * SEPARABLE_EXPANSION, 1, *size, a=a
        )
        self.separable = self._kernel(
            out, inside * SEPARABLE_EXPANSION, 1, 1, a=a
        )
        scales = [s for i, s in enumerate(self.scales) if with_1x1 or i != 4]
        self.scale = nn.Parameter(
            torch.tensor(scales)[:, None].repeat(1, out)
            * math.sqrt(scale_init)
        )
        self._scale_kernels(weight_init)
        # Constants, and in the state dict because the papers' files have
        # them: a file's prior may be one that this code would not make.
        self.register_buffer(
            'avg_pattern', torch.full(size, 1 / (size[0] * size[1]))
        )
        self.register_buffer(
            'prior_pattern', frequency_prior(out, size).float()
        )
        eye = torch.eye(inside).repeat(-(-internal_channels // inside), 1)
        self.register_buffer(
            'identity', eye[:internal_channels].reshape_as(self.inner1)
        )

    @torch.no_grad()
    def _scale_kernels(self, factor: float) -> None:
        for name, kernel in self.named_parameters():
            if name not in ('inner1', 'scale'):
                both = name in ('depthwise', 'separable')
                kernel.mul_(math.sqrt(factor) if both else factor)

    def compose(self) -> Tensor:
        """The kernel, (out, in / groups, kH, kW)."""
        spec = self.spec
        out, inside, *size = spec.kernel_shape
        origin, avg, prior, inner, *pointwise, separable = (
            row.reshape(-1, 1, 1, 1) for row in self.scale
        )
        # As the rows of the depthwise separable branch stand, see there.
        separable = separable.reshape(spec.groups, -1).t().reshape(-1, 1, 1, 1)
        kernel = compose_1x1_kxk(
            self.inner1 + self.identity, self.inner2 * inner, spec.groups
        ) + compose_separable(
            self.depthwise,
            self.separable * separable,
            spec.in_channels,
            spec.groups,
        )
        kernel = torch.addcmul(kernel, self.origin, origin)
        coefficients = [self.avg, self.prior]
        patterns = [
            (avg * self.avg_pattern).reshape(out, 1, -1),
            (prior.squeeze(1) * self.prior_pattern).reshape(out, 1, -1),
        ]
        if pointwise:
            coefficients.append(self.pointwise)
            row, column = spec.centre
            before = row * size[1] + column
            after = size[0] * size[1] - before - 1
            patterns.append(
                F.pad(pointwise[0].reshape(out, 1, 1), (before, after))
            )
        return add_patterns(
            kernel,
            torch.cat(coefficients, 3).reshape(out, inside, -1),
            torch.cat(patterns, 1),
        )


class PointwiseKernel(GeneratedKernel):
    """Two branches: the form for 1x1 kernels.

    Their scales, rows of ``scale``: the original kernel; two 1x1 kernels in
    sequence, of which the smaller starts as the identity.

    Args:
        spec: Geometry of the convolution.
    """

    scales = (1.0, 0.5)

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec)
        out, inside = spec.kernel_shape[:2]
        each = out // spec.groups
        self.origin = self._kernel(out, inside, 1, 1, a=1.0)
        if each > inside:
            eye = torch.eye(inside).repeat(spec.groups, 1)
            self.inner1 = nn.Parameter(eye.reshape(*eye.shape, 1, 1))
            self.inner2 = self._kernel(out, inside, 1, 1, a=1.0)
        else:
            self.inner1 = self._kernel(out, inside, 1, 1, a=1.0)
            eye = torch.eye(each).repeat(spec.groups, 1)
            self.inner2 = nn.Parameter(eye.reshape(*eye.shape, 1, 1))
        self.scale = nn.Parameter(
            torch.tensor(self.scales)[:, None].repeat(1, out)
        )

    def compose(self) -> Tensor:
        """The kernel, (out, in / groups, 1, 1)."""
        origin, inner = (row.reshape(-1, 1, 1, 1) for row in self.scale)
        kernel = compose_1x1_kxk(
            self.inner1, self.inner2 * inner, self.spec.groups
        )
        return torch.addcmul(kernel, self.origin, origin)


class StackedKernel(GeneratedKernel):
    """A stack of 3x3 kernels: the form for square kernels from 7x7 on.

    Args:
        spec: Geometry of the convolution; the kernel is square and odd.
        generated: Whether the 3x3 kernels are :class:`KxKKernel`, or plain
            parameters (``OREPA_LargeConvBase`` of the paper's code).
        flip: Whether the result is the kernel of the stacked convolutions.
            The paper's code does not flip the kernels as that would need;
            its checkpoints ask for False.

    Raises:
        ValueError: If the kernel is no stack of 3x3 kernels.
    """

    def __init__(
        self, spec: ConvSpec, generated: bool = True, flip: bool = False
    ) -> None:
        super().__init__(spec)
        self.flip = flip
        if not self.serves(spec.kernel_size):
            raise ValueError(
                'a stack of 3x3 kernels is square with an odd side of at '
                f'least 5, got kernel_size={spec.kernel_size}'
            )
        layers = (spec.kernel_size[0] - 1) // 2
        inside, layer_list = spec.in_channels, []
        for _ in range(layers):
            layer = ConvSpec(
                inside, spec.out_channels, 3, padding=1, groups=spec.groups
            )
            layer_list.append(
                KxKKernel(layer) if generated else PlainKernel(layer)
            )
            inside = spec.out_channels
        self.layers = nn.ModuleList(layer_list)

    @staticmethod
    def serves(kernel_size: Tuple[int, int]) -> bool:
        """Whether a kernel of this size is a stack of 3x3 kernels."""
        height, width = kernel_size
        return height == width and height % 2 == 1 and height >= 5

    def compose(self) -> Tensor:
        """The kernel, (out, in / groups, k, k)."""
        first, *others = (layer.compose() for layer in self.layers)
        kernel = first
        for other in others:
            kernel = compose_stack(
                kernel, other, self.spec.groups, flip=self.flip
            )
        return kernel

    def init_gamma(self, value: float) -> None:
        """Set all scales of all layers' branches."""
        for layer in self.layers:
            layer.init_gamma(value)

    def single_init(self) -> None:
        """Start as the stack of the original kernels."""
        for layer in self.layers:
            layer.single_init()


class PlainKernel(GeneratedKernel):
    """A kernel that is a parameter.

    Args:
        spec: Geometry of the convolution.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec)
        self.weight = self._kernel(*spec.kernel_shape, a=math.sqrt(5))

    def compose(self) -> Tensor:
        """The kernel, (out, in / groups, kH, kW)."""
        return self.weight

    def init_gamma(self, value: float) -> None:
        """Nothing: there are no scales."""

    def single_init(self) -> None:
        """Nothing: it is the original kernel alone."""
