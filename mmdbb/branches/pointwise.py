# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branch ``1x1``: a 1x1 convolution and a norm (DBB paper, sec. 3.2)."""

from mmdbb.branches.base import ConvNormBranch
from mmdbb.geometry import ConvSpec, IntPair
from mmdbb.registry import BRANCHES


@BRANCHES.register_module(name='1x1')
class Pointwise(ConvNormBranch):
    """A 1x1 convolution at the kernel's centre tap, and a norm.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
    """

    requirement = 'a kernel larger than 1x1'

    @classmethod
    def supports(cls, spec: ConvSpec) -> bool:
        return not spec.is_pointwise

    def size(self, spec: ConvSpec) -> IntPair:
        return (1,) * spec.dims
