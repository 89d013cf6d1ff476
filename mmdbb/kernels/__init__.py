# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Kernels composed from parameters at every forward pass.

Hu et al., "Online Convolutional Re-parameterization" (OREPA), CVPR 2022, sec.
3.2 and 3.3 (https://arxiv.org/abs/2204.00826). The branches of a block have a
scale each in place of a norm, so that they add up before they meet an image.
Three forms, by the size of the kernel, as in the paper's code.
"""

from .base import ComposedKernel
from .kxk import KxKKernel
from .pointwise import PointwiseKernel
from .stack import PlainKernel, StackedKernel

__all__ = [
    'ComposedKernel',
    'KxKKernel',
    'PlainKernel',
    'PointwiseKernel',
    'StackedKernel',
]
