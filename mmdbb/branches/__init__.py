# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branches that blocks sum."""

from .asymmetric import Horizontal, Vertical
from .base import Branch, ConvNormBranch, build_branch
from .composed import ComposedKxK
from .identity import Identity
from .kxk import KxK
from .pointwise import Pointwise
from .pointwise_avg import PointwiseAvg
from .pointwise_kxk import IdentityConv1x1, PointwiseKxK

__all__ = [
    'Branch',
    'ConvNormBranch',
    'ComposedKxK',
    'Horizontal',
    'Identity',
    'IdentityConv1x1',
    'KxK',
    'Pointwise',
    'PointwiseAvg',
    'PointwiseKxK',
    'Vertical',
    'build_branch',
]
