# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The papers' classes, with the names and arguments of the papers' code."""

from .blocks import ACBlock, DiverseBranchBlock, RepVGGBlock
from .orepa import (
    OREPA,
    OREPA_1x1,
    OREPA_LargeConv,
    OREPA_LargeConvBase,
    RepVGGBlock_OREPA,
)

__all__ = [
    'ACBlock',
    'DiverseBranchBlock',
    'OREPA',
    'OREPA_1x1',
    'OREPA_LargeConv',
    'OREPA_LargeConvBase',
    'RepVGGBlock',
    'RepVGGBlock_OREPA',
]
