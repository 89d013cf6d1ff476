# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""Make a composed kernel (OREPA) start as a plain kernel, all branches alive.

The other branches start at random but small, and the original kernel takes the
rest. Let K be the plain kernel and O the sum of the other branches at their
usual start. Then, for each output channel,

.. math:: f = a \lVert K \rVert / \lVert O \rVert, \quad W = K - f O

The scales of the other branches are multiplied by f, so that their sum has a
times the size of K. The original kernel W gets scale 1, so that it learns as
fast as the plain kernel would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdbb.kernels.base import ComposedKernel
from mmdbb.kernels.kxk import KxKKernel
from mmdbb.kernels.pointwise import PointwiseKernel

# A channel of zeros, which the plain network switched off, counts as this
# share of the channels' mean size. Else all of its scales would be zero, and
# its branches could never learn.
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
        generator: The composed kernel, in float64; it is overwritten.
        kernel: The plain kernel, (out, in / groups, kH, kW), in float64.
        share: Size of the sum of all branches but the original kernel,
            relative to the size of ``kernel``.
        dtype: Precision of the block, to which scales are rounded first. The
            original kernel then makes up for that rounding.

    Raises:
        ValueError: If the composed kernel is a stack, for which there is
            nothing to solve.
    """
    solver: Any = generator
    if hasattr(generator, 'start_as_'):
        solver.start_as_(kernel, share, dtype)
        return
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
    """Euclidean norm of each output channel's kernel, (out,)."""
    return kernel.flatten(1).norm(dim=1)
