# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The convolution of RepVGG.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, sec.
3.2 and 3.3 (https://arxiv.org/abs/2101.03697). Named RepVGGConv because
mmpretrain's ``RepVGG`` is a backbone.
"""

from __future__ import annotations

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer


@register_conv_layer
class RepVGGConv(BranchSumConv2d):
    """KxK, 1x1 and, where the shapes agree, the identity, summed.

    Arguments as :class:`BranchSumConv2d`.
    """

    preset = ('identity', 'kxk', '1x1')
