# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The blocks: convolutions that are trained in parts and merged into one."""

from .acb import ACB
from .base import ReparamConv2d
from .branch_sum import BranchSumConv2d
from .composed import ComposedKernelConv2d
from .conv_bn import ConvBN
from .dbb import DBB
from .dilated import DilatedReparamConv
from .forms import (
    ACB3d,
    ConvBN1d,
    ConvBN3d,
    ConvBNTranspose1d,
    ConvBNTranspose2d,
    ConvBNTranspose3d,
    DBB1d,
    DBB3d,
    DBBTranspose1d,
    DBBTranspose2d,
    DBBTranspose3d,
    DilatedReparamConv1d,
    DilatedReparamConv3d,
    LargeKernelConv1d,
    LargeKernelConv3d,
    MobileOneConv1d,
    MobileOneConv3d,
    OREPAConv1d,
    OREPAConv3d,
    OREPARepVGG1d,
    OREPARepVGG3d,
    QARepVGGConv1d,
    QARepVGGConv3d,
    RepVGGConv1d,
    RepVGGConv3d,
)
from .large_kernel import LargeKernelConv
from .linear_add import LinearAddConv
from .mobileone import MobileOneConv
from .orepa import OREPAConv, OREPARepVGG
from .qarepvgg import QARepVGGConv
from .repvgg import RepVGGConv

__all__ = [
    'ACB',
    'ACB3d',
    'BranchSumConv2d',
    'ComposedKernelConv2d',
    'ConvBN',
    'ConvBN1d',
    'ConvBN3d',
    'ConvBNTranspose1d',
    'ConvBNTranspose2d',
    'ConvBNTranspose3d',
    'DBB',
    'DBB1d',
    'DBB3d',
    'DBBTranspose1d',
    'DBBTranspose2d',
    'DBBTranspose3d',
    'DilatedReparamConv',
    'DilatedReparamConv1d',
    'DilatedReparamConv3d',
    'LargeKernelConv',
    'LargeKernelConv1d',
    'LargeKernelConv3d',
    'LinearAddConv',
    'MobileOneConv',
    'MobileOneConv1d',
    'MobileOneConv3d',
    'OREPAConv',
    'OREPAConv1d',
    'OREPAConv3d',
    'OREPARepVGG',
    'OREPARepVGG1d',
    'OREPARepVGG3d',
    'QARepVGGConv',
    'QARepVGGConv1d',
    'QARepVGGConv3d',
    'RepVGGConv',
    'RepVGGConv1d',
    'RepVGGConv3d',
    'ReparamConv2d',
]
