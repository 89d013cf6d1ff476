# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The blocks: convolutions that can be merged."""

from .acb import ACB
from .base import ReparamConv2d
from .branch_sum import BranchSumConv2d
from .conv_bn import ConvBN
from .dbb import DBB
from .generated import GeneratedKernelConv2d
from .official import ACBlock, DiverseBranchBlock, RepVGGBlock
from .official_orepa import (
    OREPA,
    OREPA_1x1,
    OREPA_LargeConv,
    OREPA_LargeConvBase,
    RepVGGBlock_OREPA,
)
from .orepa import OREPAConv, OREPARepVGG
from .qarepvgg import QARepVGGConv
from .repvgg import RepVGGConv

__all__ = [
    'ACB',
    'ACBlock',
    'BranchSumConv2d',
    'ConvBN',
    'DBB',
    'DiverseBranchBlock',
    'GeneratedKernelConv2d',
    'OREPA',
    'OREPAConv',
    'OREPARepVGG',
    'OREPA_1x1',
    'OREPA_LargeConv',
    'OREPA_LargeConvBase',
    'QARepVGGConv',
    'RepVGGBlock',
    'RepVGGBlock_OREPA',
    'RepVGGConv',
    'ReparamConv2d',
]
