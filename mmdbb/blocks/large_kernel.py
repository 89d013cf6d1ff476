# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The convolution of RepLKNet: a large kernel and a small one.

Ding et al., "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design
in CNNs", CVPR 2022, sec. 3, guideline 3 (https://arxiv.org/abs/2203.06717).
"""

from __future__ import annotations

from typing import Sequence, Union

from mmdbb.blocks.branch_sum import BranchCfg, BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer
from mmdbb.geometry import IntPair


@register_conv_layer(
    'LargeKernelConv', min_kernel_size=7, max_kernel_size=float('inf')
)
class LargeKernelConv(BranchSumConv2d):
    """The sum of a large kernel and a small one, each with a norm.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        small_kernel: Height and width of the small kernel, or one number;
            None for no small kernel. It is left out where it does not fit
            around the middle of the large one.
        kwargs: Arguments of ``nn.Conv2d`` as keywords, and those of
            :class:`BranchSumConv2d`: the list of branches, their norms and
            start values.

    Raises:
        TypeError: If ``small_kernel`` is no number and no pair.
        ValueError: If it is given together with ``branches``.

    Examples:
        >>> conv = LargeKernelConv(4, 4, 13, padding=6, groups=4)
        >>> conv.branches['kxk_k5'].conv.kernel_size
        (5, 5)
    """

    preset = ('kxk',)

    #: Size of the small kernel where none is given, as in the paper.
    default_small_kernel = 5

    def __init__(
        self,
        *args,
        small_kernel: Union[int, IntPair, None] = default_small_kernel,
        **kwargs,
    ) -> None:
        default = small_kernel == self.default_small_kernel
        if kwargs.get('branches') is not None and not default:
            raise ValueError(
                'give small_kernel or branches, not both: got small_kernel='
                f'{small_kernel!r}'
            )
        self._small_kernel = small_kernel
        super().__init__(*args, **kwargs)

    def preset_branches(self) -> Sequence[BranchCfg]:
        """See :meth:`BranchSumConv2d.preset_branches`."""
        if self._small_kernel is None:
            return self.preset
        return [*self.preset, dict(type='kxk', kernel_size=self._small_kernel)]
