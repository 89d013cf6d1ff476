# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Diverse Branch Block.

Ding et al., "Diverse Branch Block: Building a Convolution as an
Inception-like Unit", CVPR 2021, sec. 3.3 and fig. 3
(https://arxiv.org/abs/2103.13425).
"""

from __future__ import annotations

from typing import Sequence

from mmdbb.blocks.branch_sum import BranchCfg, BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer
from mmdbb.geometry import ConvSpec


@register_conv_layer('DBB')
class DBB(BranchSumConv2d):
    """KxK, 1x1, 1x1-KxK and 1x1-average pooling, summed.

    On a depthwise convolution there is no 1x1 branch, as in the paper's code.
    Arguments as :class:`BranchSumConv2d`.

    Examples:
        >>> import torch
        >>> conv = DBB(4, 8, 3, padding=1)
        >>> conv(torch.rand(2, 4, 5, 6)).shape
        torch.Size([2, 8, 5, 6])
    """

    preset = ('kxk', '1x1', '1x1_avg', '1x1_kxk')

    @classmethod
    def preset_for(cls, spec: ConvSpec) -> Sequence[BranchCfg]:
        return [
            name
            for name in cls.preset
            if not (name == '1x1' and spec.is_depthwise)
        ]
