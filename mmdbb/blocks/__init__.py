# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The blocks: convolutions that can be merged."""

from .acb import ACB
from .base import ReparamConv2d
from .branch_sum import BranchSumConv2d
from .dbb import DBB
from .official import ACBlock, DiverseBranchBlock, RepVGGBlock
from .qarepvgg import QARepVGGConv
from .repvgg import RepVGGConv

__all__ = [
    'ACB',
    'ACBlock',
    'BranchSumConv2d',
    'DBB',
    'DiverseBranchBlock',
    'QARepVGGConv',
    'RepVGGBlock',
    'RepVGGConv',
    'ReparamConv2d',
]
