# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""A composed kernel that starts as a given one, every branch alive.

As for branches with norms (:mod:`mmdbb.plain.blocks`) the original
kernel takes what the other branches leave. With K the kernel wanted and
:math:`O` what the others add up to at their usual start, channel by channel,

.. math:: f = a \lVert K \rVert / \lVert O \rVert, \quad W = K - f O

The others' scales are multiplied by f, so that they add up to the share a of
K; the original kernel's scale is 1, so that it learns as the plain kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdbb.kernels.base import ComposedKernel
from mmdbb.kernels.kxk import KxKKernel
from mmdbb.kernels.pointwise import PointwiseKernel

# A channel that the plain network switched off counts as this share of the
# channels' mean size, or its branches could never learn.
SMALLEST_SHARE = 1e-3


@torch.no_grad()
def start_as_(
    generator: ComposedKernel,
    kernel: Tensor,
    share: float,
    dtype: torch.dtype,
) -> None:
    """Make a composed kernel equal a given one, in place.

    Args:
        generator: What composes the kernel, in float64.
        kernel: The kernel wanted, (out, in / groups, kH, kW), in float64.
        share: Size of what all branches but the original kernel add up to,
            over the size of ``kernel``.
        dtype: What the scales will be rounded to.

    Raises:
        ValueError: If it has no original kernel to solve for, as a stack.
    """
    if not isinstance(generator, (KxKKernel, PointwiseKernel)):
        size = 'x'.join(map(str, generator.spec.kernel_size))
        raise ValueError(
            f'a stack of 3x3 kernels cannot start as a plain {size} kernel; '
            'leave it plain, e.g. by max_kernel_size=6 in the config of the '
            'block, or by where= of insert_blocks_'
        )
    scale = generator.scale
    scale[0] = 0
    own, wanted = _size(generator.compose()), _size(kernel)
    wanted = wanted.clamp_min(SMALLEST_SHARE * wanted.mean())
    if not wanted.any():
        wanted = own
    factor = torch.where(own > 0, share * wanted / own, 1.0)
    scale.copy_((scale * factor).to(dtype))
    generator.origin.copy_(kernel - generator.compose())
    scale[0] = 1


def _size(kernel: Tensor) -> Tensor:
    """Euclidean size of each output channel's kernel, (out,)."""
    return kernel.flatten(1).norm(dim=1)
