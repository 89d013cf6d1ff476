# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Asymmetric Convolution Block.

Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via
Asymmetric Convolution Blocks", ICCV 2019 (https://arxiv.org/abs/1908.03930).
"""

from __future__ import annotations

from typing import Tuple

from mmdbb.blocks.branch_sum import BranchCfg, BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer


@register_conv_layer('ACB')
class ACB(BranchSumConv2d):
    """The sum of a KxK, a Kx1 and a 1xK convolution, each with a norm.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        reduce_gamma: Whether all gammas start at one third, so that the sum
            is not larger than a single branch would be.
        kwargs: Arguments of ``nn.Conv2d`` as keywords, and those of
            :class:`BranchSumConv2d`: the list of branches, their norms and
            start values.

    Raises:
        ValueError: If ``reduce_gamma`` is given with ``gamma_init`` or
            ``single_init``.
    """

    preset: Tuple[BranchCfg, ...] = ('kxk', 'kx1', '1xk')

    def __init__(self, *args, reduce_gamma: bool = False, **kwargs) -> None:
        if reduce_gamma:
            given = [
                name
                for name in ('gamma_init', 'single_init')
                if kwargs.get(name) not in (None, False)
            ]
            if given:
                raise ValueError(f'give reduce_gamma or {given[0]}, not both')
            kwargs['gamma_init'] = 1 / 3
        super().__init__(*args, **kwargs)
