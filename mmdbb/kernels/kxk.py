# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""OREPA's kernel of six branches (CVPR 2022, sec. 3.3 and fig. 4)."""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdbb.geometry import ConvSpec, pad2d
from mmdbb.kernels.base import ComposedKernel, check_internal_channels
from mmdbb.transforms import (
    add_patterns,
    compose_1x1_kxk,
    compose_separable,
    frequency_prior,
)

#: Channels of the depthwise convolution for each channel of the input.
SEPARABLE_EXPANSION = 8


class KxKKernel(ComposedKernel):
    """Six branches: the form for kernels that are neither 1x1 nor a stack.

    The rows of ``scale`` belong to the branches in this order: the original
    kernel; a 1x1 followed by average pooling; a 1x1 followed by the frequency
    prior; a 1x1 followed by a KxK; a 1x1; a depthwise separable convolution.

    Args:
        spec: Geometry of the convolution.
        internal_channels: Channels between the 1x1 and the KxK. By default
            as many as the input has; twice as many with more than four
            groups.
        with_1x1: Whether to have the branch of a single 1x1. RepVGG's block
            does without, because it has a 1x1 branch of its own.
        weight_init: Factor by which the start values of the kernels are
            multiplied.
        scale_init: Square of the factor by which the start values of the
            scales are multiplied.

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
        check_internal_channels(internal_channels, spec)
        out, inside, *size = spec.kernel_shape
        # RepVGG's blocks start with smaller kernels in the paper's code.
        a = 0.0 if with_1x1 else 1.0
        self.origin = self._kernel(out, inside, *size, a=a)
        self.avg = self._kernel(out, inside, 1, 1, a=a)
        self.prior = self._kernel(out, inside, 1, 1, a=a)
        self.pointwise = None
        if with_1x1:
            self.pointwise = self._kernel(out, inside, 1, 1, a=a)
        # The kernel is the identity plus inner1, as in DBB's 1x1_kxk branch.
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
        # Constants. They are buffers because the paper's checkpoints hold
        # them, and a prior in a file may differ from the one made here.
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
        """Compose the kernel, (out, in / groups, kH, kW)."""
        spec = self.spec
        out, inside, *size = spec.kernel_shape
        origin, avg, prior, inner, *pointwise, separable = (
            row.reshape(-1, 1, 1, 1) for row in self.scale
        )
        # In the order of the 1x1's rows, for which see compose_separable.
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

    def forward_branches(self, x: Tensor) -> Tensor:
        """See :meth:`ComposedKernel.forward_branches`."""
        spec, groups = self.spec, self.spec.groups
        moves = dict(stride=spec.stride, dilation=spec.dilation)
        padded = pad2d(x, spec.pads, spec.padding_mode)

        def pointwise(kernel: Tensor) -> Tensor:
            return F.conv2d(padded, kernel, groups=groups)

        def filtered(y: Tensor, pattern: Tensor) -> Tensor:
            pattern = pattern.expand(y.shape[1], 1, *spec.kernel_size)
            return F.conv2d(y, pattern, groups=y.shape[1], **moves)

        outputs = [
            F.conv2d(padded, self.origin, groups=groups, **moves),
            filtered(pointwise(self.avg), self.avg_pattern),
            filtered(pointwise(self.prior), self.prior_pattern[:, None]),
            F.conv2d(
                pointwise(self.inner1 + self.identity),
                self.inner2,
                groups=groups,
                **moves,
            ),
        ]
        if self.pointwise is not None:
            cropped = pad2d(x, spec.pads_of((1, 1)), spec.padding_mode)
            outputs.append(
                F.conv2d(
                    cropped, self.pointwise, stride=spec.stride, groups=groups
                )
            )
        wide = F.conv2d(
            padded, self.depthwise, groups=spec.in_channels, **moves
        )
        # From the order of compose_separable to that of a grouped convolution.
        rows = self.separable.unflatten(0, (-1, groups)).transpose(0, 1)
        outputs.append(F.conv2d(wide, rows.flatten(0, 1), groups=groups))
        scales = self.scale.reshape(len(outputs), 1, -1, 1, 1)
        return sum(scale * y for scale, y in zip(scales, outputs))
