# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""OREPA's kernel of two branches for 1x1 (CVPR 2022, the paper's code)."""

from __future__ import annotations

from typing import Any, Tuple

import torch
from torch import Tensor, nn

from mmdbb.dimensions import CONV
from mmdbb.geometry import ConvSpec, pad_images
from mmdbb.kernels.base import ComposedKernel, empty_kernel
from mmdbb.transforms import compose_1x1_kxk, identity_kernel


class PointwiseKernel(ComposedKernel):
    """Two branches: the form for 1x1 kernels.

    The rows of ``scale`` belong to: the original kernel; two 1x1 kernels in
    sequence, of which the smaller one starts as the identity.

    Args:
        spec: Geometry of the convolution.
    """

    scales = (1.0, 0.5)

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec)
        out, inside = spec.kernel_shape[:2]
        grows = out // spec.groups > inside
        one = (1,) * spec.dims
        self.origin = empty_kernel(out, inside, *one)
        size = spec.in_channels if grows else out
        self.inner1 = empty_kernel(size, inside, *one)
        self.inner2 = empty_kernel(out, size // spec.groups, *one)
        self.scale = nn.Parameter(torch.empty(len(self.scales), out))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give all tensors their start values."""
        out, inside = self.spec.kernel_shape[:2]
        pair = self.inner1, self.inner2
        grows = out // self.spec.groups > inside
        eye, drawn = pair if grows else pair[::-1]
        for kernel in (self.origin, drawn):
            nn.init.kaiming_uniform_(kernel, a=1.0)
        same = identity_kernel(len(eye), self.spec.groups, dims=self.spec.dims)
        eye.copy_(same)
        self.scale.copy_(torch.tensor(self.scales)[:, None])

    def compose(self) -> Tensor:
        """Compose the kernel, (out, in / groups, 1, 1)."""
        one = (1,) * self.spec.dims
        origin, inner = (row.reshape(-1, 1, *one) for row in self.scale)
        kernel = compose_1x1_kxk(
            self.inner1, self.inner2 * inner, self.spec.groups
        )
        return torch.addcmul(kernel, self.origin, origin)

    def forward_branches(self, x: Tensor) -> Tensor:
        """See :meth:`ComposedKernel.forward_branches`."""
        spec = self.spec
        conv, one = CONV[spec.dims], (1,) * spec.dims
        x = pad_images(x, spec.pads, spec.padding_mode)
        steps = (slice(None, None, step) for step in spec.stride)
        place: Tuple[Any, ...] = (..., *steps)
        x = x[place]
        origin, inner = self.scale.reshape(2, 1, -1, *one)
        y = conv(x, self.inner1, groups=spec.groups)
        y = conv(y, self.inner2, groups=spec.groups)
        return inner * y + origin * conv(x, self.origin, groups=spec.groups)
