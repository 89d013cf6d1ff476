# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""OREPA's kernel of six branches (CVPR 2022, sec. 3.3 and fig. 4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdbb.dimensions import CONV
from mmdbb.geometry import ConvSpec, pad_images
from mmdbb.kernels.base import (
    ComposedKernel,
    check_internal_channels,
    empty_kernel,
)
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

    if TYPE_CHECKING:
        avg_pattern: Tensor
        prior_pattern: Tensor
        identity: Tensor

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
        self.weight_init, self.scale_init = weight_init, scale_init
        self.origin = empty_kernel(out, inside, *size)
        one = (1,) * spec.dims
        self.avg = empty_kernel(out, inside, *one)
        self.prior = empty_kernel(out, inside, *one)
        self.pointwise = empty_kernel(out, inside, *one) if with_1x1 else None
        # The kernel is the identity plus inner1, as in DBB's 1x1_kxk branch.
        self.inner1 = empty_kernel(internal_channels, inside, *one)
        self.inner2 = empty_kernel(
            out, internal_channels // spec.groups, *size
        )
        self.depthwise = empty_kernel(
            spec.in_channels * SEPARABLE_EXPANSION, 1, *size
        )
        self.separable = empty_kernel(out, inside * SEPARABLE_EXPANSION, *one)
        rows = len(self.scales) - (not with_1x1)
        self.scale = nn.Parameter(torch.empty(rows, out))
        # Constants. They are buffers because the paper's checkpoints hold
        # them, and a prior in a file may differ from the one made here.
        self.register_buffer('avg_pattern', torch.empty(*size))
        self.register_buffer('prior_pattern', torch.empty(out, *size))
        self.register_buffer('identity', torch.empty_like(self.inner1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give all tensors their start values, constants too."""
        with_1x1 = self.pointwise is not None
        # RepVGG's blocks start with smaller kernels in the paper's code.
        a = 0.0 if with_1x1 else 1.0
        for name, kernel in self.named_parameters():
            if name in ('inner1', 'scale'):
                continue
            nn.init.kaiming_uniform_(kernel, a=a)
            both = name in ('depthwise', 'separable')
            factor = self.weight_init
            kernel.mul_(math.sqrt(factor) if both else factor)
        self.inner1.zero_()
        scales = [s for i, s in enumerate(self.scales) if with_1x1 or i != 4]
        self.scale.copy_(
            torch.tensor(scales)[:, None] * math.sqrt(self.scale_init)
        )
        out, inside, *size = self.spec.kernel_shape
        self.avg_pattern.fill_(1 / math.prod(size))
        self.prior_pattern.copy_(frequency_prior(out, size))
        internal = len(self.identity)
        eye = torch.eye(inside).repeat(-(-internal // inside), 1)
        self.identity.copy_(eye[:internal].reshape_as(self.identity))

    def compose(self) -> Tensor:
        """Compose the kernel, (out, in / groups, kH, kW)."""
        spec = self.spec
        out, inside, *size = spec.kernel_shape
        one = (1,) * spec.dims
        origin, avg, prior, inner, *pointwise, separable = (
            row.reshape(-1, 1, *one) for row in self.scale
        )
        # In the order of the 1x1's rows, for which see compose_separable.
        separable = separable.reshape(spec.groups, -1).t().reshape(-1, 1, *one)
        kernel = compose_1x1_kxk(
            self.inner1 + self.identity, self.inner2 * inner, spec.groups
        ) + compose_separable(
            self.depthwise,
            self.separable * separable,
            spec.in_channels,
            spec.groups,
        )
        kernel = torch.addcmul(kernel, self.origin, origin)
        coefficients: List[Tensor] = [self.avg, self.prior]
        patterns = [
            (avg * self.avg_pattern).reshape(out, 1, -1),
            (prior.squeeze(1) * self.prior_pattern).reshape(out, 1, -1),
        ]
        if self.pointwise is not None:
            coefficients.append(self.pointwise)
            before = 0  # taps before the centre, row by row
            for tap, length in zip(spec.centre, size):
                before = before * length + tap
            after = math.prod(size) - before - 1
            patterns.append(
                F.pad(pointwise[0].reshape(out, 1, 1), (before, after))
            )
        return add_patterns(
            kernel,
            torch.cat(coefficients, -1).reshape(out, inside, -1),
            torch.cat(patterns, 1),
        )

    def forward_branches(self, x: Tensor) -> Tensor:
        """See :meth:`ComposedKernel.forward_branches`."""
        spec, groups = self.spec, self.spec.groups
        moves: Dict[str, Any] = dict(
            stride=spec.stride, dilation=spec.dilation
        )
        conv, one = CONV[spec.dims], (1,) * spec.dims
        padded = pad_images(x, spec.pads, spec.padding_mode)

        def pointwise(kernel: Tensor) -> Tensor:
            return conv(padded, kernel, groups=groups)

        def filtered(y: Tensor, pattern: Tensor) -> Tensor:
            pattern = pattern.expand(y.shape[1], 1, *spec.kernel_size)
            return conv(y, pattern, groups=y.shape[1], **moves)

        outputs = [
            conv(padded, self.origin, groups=groups, **moves),
            filtered(pointwise(self.avg), self.avg_pattern),
            filtered(pointwise(self.prior), self.prior_pattern[:, None]),
            conv(
                pointwise(self.inner1 + self.identity),
                self.inner2,
                groups=groups,
                **moves,
            ),
        ]
        if self.pointwise is not None:
            cropped = pad_images(x, spec.pads_of(one), spec.padding_mode)
            outputs.append(
                conv(
                    cropped, self.pointwise, stride=spec.stride, groups=groups
                )
            )
        wide = conv(padded, self.depthwise, groups=spec.in_channels, **moves)
        # From the order of compose_separable to that of a grouped convolution.
        rows = self.separable.unflatten(0, (-1, groups)).transpose(0, 1)
        outputs.append(conv(wide, rows.flatten(0, 1), groups=groups))
        scales = self.scale.reshape(len(outputs), 1, -1, *one)
        return sum(scale * y for scale, y in zip(scales, outputs))
