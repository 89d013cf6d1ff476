# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branches ``kx1`` and ``1xk`` of the Asymmetric Convolution Block.

Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via
Asymmetric Convolution Blocks", ICCV 2019 (https://arxiv.org/abs/1908.03930).
"""

from mmdbb.branches.base import ConvNormBranch
from mmdbb.geometry import ConvSpec, IntPair
from mmdbb.registry import BRANCHES


class _Asymmetric(ConvNormBranch):
    requirement = 'a kernel larger than 1 in both directions'

    @classmethod
    def supports(cls, spec: ConvSpec) -> bool:
        return min(spec.kernel_size) > 1


@BRANCHES.register_module(name='kx1')
class Vertical(_Asymmetric):
    """A Kx1 convolution at the kernel's centre column, and a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
    """

    def size(self, spec: ConvSpec) -> IntPair:
        return (spec.kernel_size[0], 1)


@BRANCHES.register_module(name='1xk')
class Horizontal(_Asymmetric):
    """A 1xK convolution at the kernel's centre row, and a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
    """

    def size(self, spec: ConvSpec) -> IntPair:
        return (1, spec.kernel_size[1])
