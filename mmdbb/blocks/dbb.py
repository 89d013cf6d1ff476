# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Diverse Branch Block.

Ding et al., "Diverse Branch Block: Building a Convolution as an
Inception-like Unit", CVPR 2021, sec. 3.3 and fig. 3
(https://arxiv.org/abs/2103.13425).
"""

from __future__ import annotations

from typing import Sequence, Tuple

from mmdbb.blocks.branch_sum import BranchCfg, BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer
from mmdbb.geometry import ConvSpec


@register_conv_layer('DBB')
class DBB(BranchSumConv2d):
    """The sum of a KxK, a 1x1, a 1x1-KxK and a 1x1-average pooling branch.

    A depthwise DBB has no 1x1 branch, as in the paper's code.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        kwargs: The same as keywords, and those of :class:`BranchSumConv2d`:
            the list of branches, their norms and start values.

    Examples:
        >>> import torch
        >>> conv = DBB(4, 8, 3, padding=1)
        >>> conv(torch.rand(2, 4, 5, 6)).shape
        torch.Size([2, 8, 5, 6])
    """

    preset: Tuple[BranchCfg, ...] = ('kxk', '1x1', '1x1_avg', '1x1_kxk')

    @classmethod
    def preset_for(cls, spec: ConvSpec) -> Sequence[BranchCfg]:
        return [
            name
            for name in cls.preset
            if not (name == '1x1' and spec.is_depthwise)
        ]
