# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The blocks: convolutions that are trained in parts and merged into one."""

from .acb import ACB
from .base import ReparamConv2d
from .branch_sum import BranchSumConv2d
from .composed import ComposedKernelConv2d
from .conv_bn import ConvBN
from .dbb import DBB
from .linear_add import LinearAddConv
from .orepa import OREPAConv, OREPARepVGG
from .qarepvgg import QARepVGGConv
from .repvgg import RepVGGConv

__all__ = [
    'ACB',
    'BranchSumConv2d',
    'ConvBN',
    'DBB',
    'ComposedKernelConv2d',
    'LinearAddConv',
    'OREPAConv',
    'OREPARepVGG',
    'QARepVGGConv',
    'RepVGGConv',
    'ReparamConv2d',
]
