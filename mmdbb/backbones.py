# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Backbones with blocks, for mmpretrain and through it for mmdet and mmseg."""

from mmdbb.mm.backbones import (
    VGGDBB,
    AlexNetDBB,
    BlocksForConvNorm,
    MobileNetV1,
    MobileNetV1DBB,
    PlainAlexNet,
    PlainRepVGG,
    PlainResNet,
    PlainResNeXt,
    ReparamRepVGG,
    ResNetDBB,
    ResNetV1cDBB,
    ResNetV1dDBB,
    ResNeXtDBB,
)

__all__ = [
    'AlexNetDBB',
    'BlocksForConvNorm',
    'MobileNetV1',
    'MobileNetV1DBB',
    'PlainAlexNet',
    'PlainRepVGG',
    'PlainResNeXt',
    'PlainResNet',
    'ReparamRepVGG',
    'ResNeXtDBB',
    'ResNetDBB',
    'ResNetV1cDBB',
    'ResNetV1dDBB',
    'VGGDBB',
]
