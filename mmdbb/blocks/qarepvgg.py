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
    """The sum of a KxK with norm, a 1x1 and the identity; then one norm.

    The 1x1 and the identity have no norms of their own. A norm multiplies its
    branch by gamma over the standard deviation, and that factor may be large.
    The merged kernel would then have outliers, beside which eight bits cannot
    represent the other values.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        kwargs: The same as keywords, and those of :class:`BranchSumConv2d`:
            the list of branches, their norms and start values.

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
