# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Online re-parameterized convolutions.

Hu et al., "Online Convolutional Re-parameterization" (OREPA), CVPR 2022
(https://arxiv.org/abs/2204.00826): sec. 3 and fig. 4 for the block, sec. 4.2
for the block of RepVGG.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Optional

from mmdbb.blocks.build import register_conv_layer
from mmdbb.blocks.composed import ComposedKernelConv2d
from mmdbb.blocks.repvgg import RepVGGConv
from mmdbb.geometry import ConvSpec, IntPair
from mmdbb.kernels import (
    ComposedKernel,
    KxKKernel,
    PointwiseKernel,
    StackedKernel,
)
from mmdbb.kernels.stack import check_flip


@register_conv_layer('OREPA', min_kernel_size=1, max_kernel_size=math.inf)
class OREPAConv(ComposedKernelConv2d):
    """A kernel of several branches, composed before it meets an image.

    As in the paper's code, the form follows from the kernel's size: two
    branches for 1x1, a stack of 3x3 kernels for odd square kernels from 7x7
    on, six branches for all others. It has no norm: the host's follows.

    Args:
        args: As :class:`ReparamConv2d`, keywords too.
        internal_channels: Width inside the branch of a 1x1 and a KxK; by
            default that of the input, and twice that with more than four
            groups.
        flip: Whether a stack's kernel is that of the stacked convolutions;
            with False that of the paper's code, which its checkpoints need.
        single_init: Whether only the original kernel starts with a scale
            other than zero.

    Raises:
        TypeError: If ``flip`` is not a bool.

    Examples:
        >>> import torch
        >>> conv = OREPAConv(4, 8, 3, padding=1)
        >>> conv(torch.rand(2, 4, 5, 6)).shape
        torch.Size([2, 8, 5, 6])
    """

    def __init__(
        self,
        *args,
        internal_channels: Optional[int] = None,
        flip: bool = False,
        single_init: bool = False,
        **kwargs,
    ) -> None:
        check_flip(flip)
        super().__init__(
            partial(_form, internal_channels=internal_channels, flip=flip),
            *args,
            single_init=single_init,
            **kwargs,
        )

    @classmethod
    def starts_plain(cls, kernel_size: IntPair) -> bool:
        """No stack does: it composes only some of all kernels."""
        return not _is_stack(kernel_size)


@register_conv_layer('OREPARepVGG')
class OREPARepVGG(RepVGGConv):
    """RepVGG's convolution, its KxK branch composed as OREPA's.

    Arguments as :class:`BranchSumConv2d`.

    Examples:
        >>> import torch
        >>> conv = OREPARepVGG(4, 4, 3, padding=1)
        >>> sorted(conv.branches)
        ['1x1', 'identity', 'orepa']
    """

    preset = ('identity', 'orepa', '1x1')


def _is_stack(kernel_size: IntPair) -> bool:
    return max(kernel_size) >= 7 and StackedKernel.serves(kernel_size)


def _form(
    spec: ConvSpec, internal_channels: Optional[int], flip: bool
) -> ComposedKernel:
    if spec.is_pointwise:
        return PointwiseKernel(spec)
    if _is_stack(spec.kernel_size):
        return StackedKernel(spec, flip=flip)
    return KxKKernel(spec, internal_channels)
