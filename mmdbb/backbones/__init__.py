# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmpretrain's backbones with blocks."""

from .resnet import ResNetDBB, ResNetV1cDBB, ResNetV1dDBB, ResNeXtDBB

__all__ = ['ResNeXtDBB', 'ResNetDBB', 'ResNetV1cDBB', 'ResNetV1dDBB']
