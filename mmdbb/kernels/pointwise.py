# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""OREPA's kernel of two branches for 1x1 (CVPR 2022, the paper's code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdbb.geometry import ConvSpec, pad2d
from mmdbb.kernels.base import ComposedKernel
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
        each = out // spec.groups
        self.origin = self._kernel(out, inside, 1, 1, a=1.0)
        if each > inside:
            self.inner1 = nn.Parameter(
                identity_kernel(spec.in_channels, spec.groups)
            )
            self.inner2 = self._kernel(out, inside, 1, 1, a=1.0)
        else:
            self.inner1 = self._kernel(out, inside, 1, 1, a=1.0)
            self.inner2 = nn.Parameter(
                identity_kernel(spec.out_channels, spec.groups)
            )
        self.scale = nn.Parameter(
            torch.tensor(self.scales)[:, None].repeat(1, out)
        )

    def compose(self) -> Tensor:
        """Compose the kernel, (out, in / groups, 1, 1)."""
        origin, inner = (row.reshape(-1, 1, 1, 1) for row in self.scale)
        kernel = compose_1x1_kxk(
            self.inner1, self.inner2 * inner, self.spec.groups
        )
        return torch.addcmul(kernel, self.origin, origin)

    def forward_branches(self, x: Tensor) -> Tensor:
        """See :meth:`ComposedKernel.forward_branches`."""
        spec = self.spec
        x = pad2d(x, spec.pads, spec.padding_mode)
        down, right = spec.stride
        x = x[..., ::down, ::right]
        origin, inner = self.scale.reshape(2, 1, -1, 1, 1)
        y = F.conv2d(x, self.inner1, groups=spec.groups)
        y = F.conv2d(y, self.inner2, groups=spec.groups)
        return inner * y + origin * F.conv2d(
            x, self.origin, groups=spec.groups
        )
