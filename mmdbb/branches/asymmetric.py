# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branches of the Asymmetric Convolution Block: one kernel a direction.

Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via
Asymmetric Convolution Blocks", ICCV 2019 (https://arxiv.org/abs/1908.03930).
For pictures they are ``kx1`` and ``1xk``; for volumes and videos ``kx1x1``,
``1xkx1`` and ``1x1xk``. Along a line there is one direction, whose kernel is
the block's own.
"""

from mmdbb.branches.base import ConvNormBranch
from mmdbb.geometry import ConvSpec, IntPair
from mmdbb.registry import BRANCHES


class _Asymmetric(ConvNormBranch):
    #: The dimension in which the kernel is as large as the block's, and how
    #: many dimensions there are.
    direction, dims = 0, 2
    requirement = 'a kernel larger than 1 in both directions'

    @classmethod
    def supports(cls, spec: ConvSpec) -> bool:
        own = cls.direction
        return spec.dims == cls.dims and (
            spec.kernel_size[own] > 1
            # Without another direction it would be the kxk branch again.
            and any(k > 1 for i, k in enumerate(spec.kernel_size) if i != own)
        )

    def size(self, spec: ConvSpec) -> IntPair:
        return tuple(
            k if i == self.direction else 1
            for i, k in enumerate(spec.kernel_size)
        )


class _Asymmetric3d(_Asymmetric):
    dims = 3
    requirement = (
        'three dimensions, and a kernel larger than 1 in its direction and '
        'in another one'
    )


@BRANCHES.register_module(name='kx1')
class Vertical(_Asymmetric):
    """A Kx1 convolution at the kernel's centre column, and a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
    """

    direction = 0


@BRANCHES.register_module(name='1xk')
class Horizontal(_Asymmetric):
    """A 1xK convolution at the kernel's centre row, and a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
    """

    direction = 1


@BRANCHES.register_module(name='kx1x1')
class First(_Asymmetric3d):
    """A convolution along the first dimension (time, depth), and a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
    """

    direction = 0


@BRANCHES.register_module(name='1xkx1')
class Second(_Asymmetric3d):
    """A convolution along the second dimension (height), and a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
    """

    direction = 1


@BRANCHES.register_module(name='1x1xk')
class Third(_Asymmetric3d):
    """A convolution along the third dimension (width), and a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
    """

    direction = 2
