# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The papers' own classes, by their names and with their arguments."""

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
