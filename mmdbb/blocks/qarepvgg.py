# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The convolution of QARepVGG, made for quantization.

Chu et al., "Make RepVGG Greater Again: A Quantization-aware Approach", AAAI
2024, sec. 4 and fig. 4 (https://arxiv.org/abs/2212.01593); the variant S4,
``QARepVGGBlockV2`` in the paper's code.
"""

from __future__ import annotations

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer


@register_conv_layer('QARepVGGConv')
class QARepVGGConv(BranchSumConv2d):
    """KxK and its norm, a bare 1x1, a bare identity, and a norm of the sum.

    A norm in the side branches multiplies them by its gamma over a standard
    deviation, which may be large: the merged kernel then has outliers that
    eight bits cannot hold beside the rest. Arguments as
    :class:`BranchSumConv2d`.

    Examples:
        >>> import torch
        >>> conv = QARepVGGConv(4, 4, 3, padding=1)
        >>> conv(torch.rand(2, 4, 5, 6)).shape
        torch.Size([2, 4, 5, 6])
    """

    preset = (
        'kxk',
        dict(type='1x1', norm=False),
        dict(type='identity', norm=False),
    )
    preset_sum_norm = True
