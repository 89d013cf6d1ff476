# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Structural re-parameterization for plain PyTorch and OpenMMLab 2.x.

The blocks need torch only. Where mmengine and mmcv are installed, importing
the package registers the blocks with them, so that
``conv_cfg=dict(type='DBB')`` works in any config. ``mmdbb.backbones``, which
needs mmpretrain, is imported on its own.
"""

import importlib
import importlib.util

from mmdbb.blocks import (
    ACB,
    DBB,
    DilatedReparamConv,
    LargeKernelConv,
    MobileOneConv,
    OREPAConv,
    OREPARepVGG,
    QARepVGGConv,
    ReparamConv2d,
    RepVGGConv,
)
from mmdbb.insert import insert_blocks_, merge_into_
from mmdbb.merge_back import merge_back_
from mmdbb.official import (
    OREPA,
    ACBlock,
    DilatedReparamBlock,
    DiverseBranchBlock,
    MobileOneBlock,
    OREPA_1x1,
    OREPA_LargeConv,
    OREPA_LargeConvBase,
    ReparamLargeKernelConv,
    RepVGGBlock,
    RepVGGBlock_OREPA,
)
from mmdbb.plain.weights import load_plain_weights_
from mmdbb.reparam import reparameterize
from mmdbb.version import __version__

#: Names that need mmengine and mmcv -> the modules that define them.
_OF_HOSTS = {
    'BackbonePretrainedInit': 'mmdbb.mm.starts.backbone',
    'CheckpointReportOptions': 'mmdbb.mm.checkpoint_report',
    'BlocksHook': 'mmdbb.mm.engine.blocks_hook',
    'BranchSharesHook': 'mmdbb.mm.engine.branch_shares_hook',
    'DataCheckHook': 'mmdbb.mm.engine.data_check',
    'LayerDecayOptimWrapperConstructor': 'mmdbb.mm.engine.layer_decay',
    'OfficialPretrainedInit': 'mmdbb.mm.starts.official',
    'PlainPretrainedInit': 'mmdbb.mm.starts.plain',
    'ReparamHook': 'mmdbb.mm.engine.reparam_hook',
    'ReparamOptimWrapperConstructor': 'mmdbb.mm.engine.optim',
    'RepOptInit': 'mmdbb.mm.starts.repopt',
    'RepOptimWrapperConstructor': 'mmdbb.mm.engine.repopt',
    'RepeatableHook': 'mmdbb.mm.engine.repeatable',
    'TorchDefaultInit': 'mmdbb.mm.starts.torch_default',
    'WholeCheckpointHook': 'mmdbb.mm.engine.whole_checkpoints',
    'check_data': 'mmdbb.mm.engine.data_check',
    'load_deployed': 'mmdbb.mm.deploy.load',
    'report_checkpoint': 'mmdbb.mm.checkpoint_report',
}

__all__ = [
    'ACB',
    'ACBlock',
    'DBB',
    'DilatedReparamBlock',
    'DilatedReparamConv',
    'DiverseBranchBlock',
    'LargeKernelConv',
    'MobileOneBlock',
    'MobileOneConv',
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
    'ReparamConv2d',
    'ReparamLargeKernelConv',
    '__version__',
    'insert_blocks_',
    'load_plain_weights_',
    'merge_back_',
    'merge_into_',
    'reparameterize',
]


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # an import hook may refuse to look
        return False


if _is_installed('mmengine') and _is_installed('mmcv'):
    import mmdbb.mm.registration  # noqa: F401

    __all__ += list(_OF_HOSTS)


def __getattr__(name: str):
    if name not in _OF_HOSTS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    # If a package is missing, the import raises and names it.
    return getattr(importlib.import_module(_OF_HOSTS[name]), name)
