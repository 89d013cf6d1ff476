# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The papers' classes, with the names and arguments of the papers' code."""

from .blocks import ACBlock, DiverseBranchBlock, RepVGGBlock
from .large_kernels import DilatedReparamBlock, ReparamLargeKernelConv
from .mobileone import MobileOneBlock
from .orepa import (
    OREPA,
    OREPA_1x1,
    OREPA_LargeConv,
    OREPA_LargeConvBase,
    RepVGGBlock_OREPA,
)

__all__ = [
    'ACBlock',
    'DilatedReparamBlock',
    'DiverseBranchBlock',
    'MobileOneBlock',
    'OREPA',
    'OREPA_1x1',
    'OREPA_LargeConv',
    'OREPA_LargeConvBase',
    'RepVGGBlock',
    'RepVGGBlock_OREPA',
    'ReparamLargeKernelConv',
]
