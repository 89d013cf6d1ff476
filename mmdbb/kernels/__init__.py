# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Composed kernels: computed from parameters in every forward pass.

Hu et al., "Online Convolutional Re-parameterization" (OREPA), CVPR 2022, sec.
3.2 and 3.3 (https://arxiv.org/abs/2204.00826). Each branch has a scale in
place of a norm. A scale does not depend on the images, so the branches can be
added up before the convolution. As in the paper's code there are three forms:
for 1x1 kernels, for large kernels, and for all others.
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
