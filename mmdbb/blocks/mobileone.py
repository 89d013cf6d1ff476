# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The convolution of MobileOne.

Vasu et al., "MobileOne: An Improved One millisecond Mobile Backbone", CVPR
2023, sec. 3.3 and fig. 3 (https://arxiv.org/abs/2206.04040).
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, Sequence

from mmdbb.blocks.branch_sum import BranchCfg, BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer


@register_conv_layer('MobileOneConv', min_kernel_size=1)
class MobileOneConv(BranchSumConv2d):
    """The sum of several KxK, a 1x1 and the identity, each with a norm.

    The identity is left out where input and output differ in shape, the 1x1
    where the kernel itself is one. Also 1x1 kernels become blocks, as in the
    paper.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        num_conv_branches: Number of KxK branches, the paper's k: 4 for the
            smallest network, MobileOne-S0, 1 for all others.
        kwargs: Arguments of ``nn.Conv2d`` as keywords, and those of
            :class:`BranchSumConv2d`: the list of branches, their norms and
            start values.

    Raises:
        TypeError: If ``num_conv_branches`` is no whole number.
        ValueError: If it is smaller than 1, or given together with
            ``branches``.

    Examples:
        >>> conv = MobileOneConv(4, 4, 3, padding=1, num_conv_branches=2)
        >>> list(conv.branches)
        ['identity', '1x1', 'kxk', 'kxk_2']
    """

    preset = ('identity', '1x1', 'kxk')

    #: Number of KxK branches where none is given.
    default_num_conv_branches = 4

    def __init__(
        self,
        *args,
        num_conv_branches: int = default_num_conv_branches,
        **kwargs,
    ) -> None:
        count: Any = num_conv_branches
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise TypeError(
                f'num_conv_branches must be a whole number, got {count!r}'
            )
        if count < 1:
            raise ValueError(f'num_conv_branches must be at least 1: {count}')
        default = count == self.default_num_conv_branches
        if kwargs.get('branches') is not None and not default:
            raise ValueError(
                'give num_conv_branches or branches, not both: got '
                f'num_conv_branches={count}'
            )
        self._num_conv_branches = int(count)
        super().__init__(*args, **kwargs)

    def preset_branches(self) -> Sequence[BranchCfg]:
        """See :meth:`BranchSumConv2d.preset_branches`."""
        *others, kxk = self.preset
        return [*others, *[kxk] * self._num_conv_branches]
