# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A convolution and its batch norm: the block of a single branch.

What a merged convolution becomes when it is to be trained on, before eight
bits, with a norm again (:mod:`mmdbb.mm.quantization.insert_bn`).
"""

from __future__ import annotations

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer


@register_conv_layer('ConvBN')
class ConvBN(BranchSumConv2d):
    """The KxK convolution and its norm alone.

    Arguments as :class:`BranchSumConv2d`.
    """

    preset = ('kxk',)
