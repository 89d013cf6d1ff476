# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Backbones with blocks, for mmpretrain and through it for mmdet and mmseg."""

from .mobilenet import MobileNetV1, MobileNetV1DBB
from .resnet import (
    PlainResNet,
    PlainResNeXt,
    ResNetDBB,
    ResNetV1cDBB,
    ResNetV1dDBB,
    ResNeXtDBB,
)

__all__ = [
    'MobileNetV1',
    'MobileNetV1DBB',
    'PlainResNeXt',
    'PlainResNet',
    'ResNeXtDBB',
    'ResNetDBB',
    'ResNetV1cDBB',
    'ResNetV1dDBB',
]
