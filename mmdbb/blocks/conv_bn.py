# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A convolution and its batch norm: the block of a single branch.

A merged convolution has lost its norm. To train it further, for example for
eight bits, it becomes this block, which has a norm again
(:mod:`mmdbb.mm.quantization.insert_bn`).
"""

from __future__ import annotations

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer


@register_conv_layer('ConvBN')
class ConvBN(BranchSumConv2d):
    """The KxK convolution with its norm, and no other branch.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        kwargs: The same as keywords, and those of :class:`BranchSumConv2d`:
            the list of branches, their norms and start values.
    """

    preset = ('kxk',)
