# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branch ``kxk``: the original convolution and its norm."""

from torch import Tensor

from mmdbb.branches.base import ConvNormBranch, kernel_of
from mmdbb.geometry import ConvSpec, IntPair
from mmdbb.registry import BRANCHES


@BRANCHES.register_module(name='kxk')
class KxK(ConvNormBranch):
    """A convolution with the block's own geometry, and a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
    """

    @staticmethod
    def size(spec: ConvSpec) -> IntPair:
        return spec.kernel_size

    @property
    def kernel(self) -> Tensor:
        """Shape (out, in / groups, kH, kW)."""
        return kernel_of(self.conv.weight, self.spec)
