# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Dilated Reparam Block.

Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for
Audio, Video, Point Cloud, Time-Series and Image Recognition", CVPR 2024, sec.
3.2 (https://arxiv.org/abs/2311.15599).
"""

from __future__ import annotations

from typing import Sequence

from mmdbb.blocks.branch_sum import BranchCfg, BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer
from mmdbb.geometry import ConvSpec

#: By the size of the block's kernel: size and dilation of its small kernels,
#: as ``DilatedReparamBlock`` of the paper's code lists them.
SMALL_KERNELS = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


@register_conv_layer(
    'DilatedReparamConv', min_kernel_size=5, max_kernel_size=float('inf')
)
class DilatedReparamConv(BranchSumConv2d):
    """The sum of a large kernel and small dilated ones, each with a norm.

    Which small kernels, the paper's table says by the size of the large one,
    from 5 to 17. A larger kernel gets those of 17. Of a kernel that is not
    square the shorter side counts. A kernel that is even, or shorter than 5,
    gets none. The paper's blocks are depthwise; these need not be.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        kwargs: The same as keywords, and those of :class:`BranchSumConv2d`:
            the list of branches, their norms and start values.

    Examples:
        >>> import torch
        >>> conv = DilatedReparamConv(4, 4, 7, padding=3, groups=4)
        >>> conv(torch.rand(2, 4, 9, 8)).shape
        torch.Size([2, 4, 9, 8])
        >>> len(conv.branches)
        4
    """

    preset = ('kxk',)

    @classmethod
    def preset_for(cls, spec: ConvSpec) -> Sequence[BranchCfg]:
        shorter = min(spec.kernel_size)
        known = [size for size in SMALL_KERNELS if size <= shorter]
        small = SMALL_KERNELS[max(known)] if known else ()
        return [
            *cls.preset,
            *(dict(type='kxk', kernel_size=k, dilation=r) for k, r in small),
        ]
