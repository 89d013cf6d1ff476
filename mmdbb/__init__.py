# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Structural re-parameterization for OpenMMLab 2.x and plain PyTorch."""

from mmdbb.blocks import (
    ACB,
    DBB,
    ACBlock,
    DiverseBranchBlock,
    RepVGGBlock,
    RepVGGConv,
)
from mmdbb.reparam import reparameterize
from mmdbb.version import __version__

__all__ = [
    'ACB',
    'ACBlock',
    'DBB',
    'DiverseBranchBlock',
    'RepVGGBlock',
    'RepVGGConv',
    '__version__',
    'reparameterize',
]
