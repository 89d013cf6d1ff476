# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Structural re-parameterization for OpenMMLab 2.x and plain PyTorch.

Importing the package registers its convolution layers, so that
``conv_cfg=dict(type='DBB')`` works in any config. ``mmdbb.backbones``, which
needs mmpretrain, is imported on its own.
"""

from mmdbb import hosts

hosts.require('mmengine')
hosts.require('mmcv')
hosts.cure_config_bases()

from mmdbb.blocks import (
    ACB,
    DBB,
    OREPA,
    ACBlock,
    DiverseBranchBlock,
    OREPA_1x1,
    OREPA_LargeConv,
    OREPA_LargeConvBase,
    OREPAConv,
    OREPARepVGG,
    QARepVGGConv,
    RepVGGBlock,
    RepVGGBlock_OREPA,
    RepVGGConv,
)
from mmdbb.checkpoint.backbone_init import BackbonePretrainedInit
from mmdbb.checkpoint.host_loading import read_as_data
from mmdbb.checkpoint.load import load_deployed
from mmdbb.checkpoint.official_init import OfficialPretrainedInit
from mmdbb.checkpoint.plain import load_plain_weights_
from mmdbb.checkpoint.plain_init import PlainPretrainedInit
from mmdbb.checkpoint.torch_init import TorchDefaultInit
from mmdbb.engine.optim import ReparamOptimWrapperConstructor
from mmdbb.engine.reparam_hook import ReparamHook
from mmdbb.engine.repeatable import RepeatableHook
from mmdbb.engine.whole_checkpoints import WholeCheckpointHook
from mmdbb.insert import insert_blocks_, merge_into_
from mmdbb.reparam import reparameterize
from mmdbb.version import __version__

read_as_data()

__all__ = [
    'ACB',
    'ACBlock',
    'BackbonePretrainedInit',
    'DBB',
    'DiverseBranchBlock',
    'OfficialPretrainedInit',
    'PlainPretrainedInit',
    'OREPA',
    'OREPAConv',
    'OREPARepVGG',
    'OREPA_1x1',
    'OREPA_LargeConv',
    'OREPA_LargeConvBase',
    'QARepVGGConv',
    'RepVGGBlock',
    'RepVGGBlock_OREPA',
    'RepVGGConv',
    'ReparamHook',
    'ReparamOptimWrapperConstructor',
    'TorchDefaultInit',
    'RepeatableHook',
    'WholeCheckpointHook',
    '__version__',
    'insert_blocks_',
    'load_deployed',
    'load_plain_weights_',
    'merge_into_',
    'reparameterize',
]
