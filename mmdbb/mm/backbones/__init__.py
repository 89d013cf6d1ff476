# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Backbones with blocks, for mmpretrain and through it for mmdet and mmseg."""

from mmdbb.mm.hosts import require

require('mmpretrain')

from .absorbed import BlocksForConvNorm
from .alexnet import AlexNetDBB, PlainAlexNet
from .mobilenet import MobileNetV1, MobileNetV1DBB
from .repvgg import PlainRepVGG, ReparamRepVGG
from .resnet import (
    PlainResNet,
    PlainResNeXt,
    ResNetDBB,
    ResNetV1cDBB,
    ResNetV1dDBB,
    ResNeXtDBB,
)
from .unireplknet import PlainUniRepLKNet, UniRepLKNet
from .vgg import VGGDBB

__all__ = [
    'AlexNetDBB',
    'BlocksForConvNorm',
    'MobileNetV1',
    'MobileNetV1DBB',
    'PlainAlexNet',
    'PlainRepVGG',
    'PlainResNeXt',
    'PlainResNet',
    'PlainUniRepLKNet',
    'ReparamRepVGG',
    'ResNeXtDBB',
    'ResNetDBB',
    'ResNetV1cDBB',
    'ResNetV1dDBB',
    'UniRepLKNet',
    'VGGDBB',
]
