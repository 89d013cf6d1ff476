# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""OREPA's blocks: convolutions with composed kernels.

Hu et al., "Online Convolutional Re-parameterization" (OREPA), CVPR 2022
(https://arxiv.org/abs/2204.00826): sec. 3 and fig. 4 for the block, sec. 4.2
for RepVGG's block with a composed kernel.
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
    """A convolution whose kernel is composed of several branches.

    As in the paper's code, the size of the kernel decides its form: two
    branches for 1x1, a stack of 3x3 kernels for odd square kernels from 7x7
    on, six branches for all others. The block has no norm; the network puts
    one behind it.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        internal_channels: Channels between the 1x1 and the KxK of the
            kernel's branch of both. By default as many as the input has;
            twice as many with more than four groups.
        flip: Whether a stack's composed kernel equals the sequence of its
            convolutions. The paper's code does not flip the kernels as that
            needs, so its checkpoints need False.
        single_init: Whether the original kernel starts with scale 1 and all
            other branches with 0.
        kwargs: Arguments of ``nn.Conv2d`` as keywords, and ``deploy`` and
            ``init_cfg`` of :class:`ReparamConv2d`.

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
        """Whether a block of this size can start as any plain convolution.

        A stack cannot: 3x3 kernels in sequence do not make every kernel.

        Args:
            kernel_size: Height and width in taps.
        """
        return not _is_stack(kernel_size)


@register_conv_layer('OREPARepVGG')
class OREPARepVGG(RepVGGConv):
    """RepVGG's block, with a composed kernel (OREPA's) in its KxK branch.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        kwargs: The same as keywords, and those of :class:`BranchSumConv2d`:
            the list of branches, their norms and start values.

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
