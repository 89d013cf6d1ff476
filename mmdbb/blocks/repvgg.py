# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The convolution of RepVGG.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, sec.
3.2 and 3.3 (https://arxiv.org/abs/2101.03697). Named RepVGGConv because
mmpretrain's ``RepVGG`` is a backbone.
"""

from __future__ import annotations

from typing import Any, Tuple

from torch import Tensor

from mmdbb.blocks.base import refuse_merged
from mmdbb.blocks.branch_sum import DENSE_BRANCHES, BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer
from mmdbb.branches.base import kernel_of
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.dimensions import per_channel


@register_conv_layer('RepVGGConv')
class RepVGGConv(BranchSumConv2d):
    """The sum of a KxK, a 1x1 and the identity, each with a norm.

    The identity is left out where input and output differ in shape.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        kwargs: The same as keywords, and those of :class:`BranchSumConv2d`:
            the list of branches, their norms and start values.
    """

    preset = ('identity', 'kxk', '1x1')

    def get_custom_L2(self) -> Tensor:
        """Compute the penalty that replaces weight decay in the paper's code.

        It adds up the squares of the KxK kernel's outer taps and the squares
        of the equivalent kernel's centre tap. The centre is divided by the
        norms' scales first, so that it counts in the units of an unscaled
        kernel, which weight decay would see. As in the paper's code the
        scales count as constants. A channel whose scales are zero adds
        nothing for the centre.

        Returns:
            Tensor: One number, differentiable in both kernels. Add half of
            it, times the weight decay, to the training loss.

        Raises:
            ValueError: If the block is merged, or has no KxK branch.
        """
        refuse_merged(self, 'custom L2')
        branches = self.branches
        if self.dense_branch is None:
            wanted = next(n for n in DENSE_BRANCHES if n in self.preset)
            raise ValueError(
                f'custom L2 needs the branch {wanted!r}, got {list(branches)}'
            )
        dense: Any = branches[self.dense_branch]
        kernel = dense.kernel
        taps = (slice(tap, tap + 1) for tap in self.spec.centre)
        place: Tuple[Any, ...] = (slice(None), slice(None), *taps)
        centre = kernel[place]
        outer = kernel.square().sum() - centre.square().sum()
        scale = _scale_of(dense)
        equivalent, units = centre * scale, scale.square()
        if '1x1' in branches:
            pointwise: Any = branches['1x1']
            scale = _scale_of(pointwise)
            weight = kernel_of(pointwise.conv.weight, self.spec)
            equivalent = equivalent + weight * scale
            units = units + scale.square()
        # Where the scales are zero, the equivalent centre is zero too.
        units = units.masked_fill(units == 0, 1)
        return outer + (equivalent.square() / units).sum()


def _scale_of(branch: Any) -> Tensor:
    """The scale of a branch that is one kernel and one norm."""
    scale = norm_scale_shift(branch.norm).scale.detach()
    return per_channel(scale, branch.spec.dims + 1)
