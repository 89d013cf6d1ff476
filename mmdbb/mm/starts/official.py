# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""``init_cfg=dict(type='OfficialPretrained', checkpoint=...)`` in a config."""

from __future__ import annotations

from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from mmdbb.mm.official.convert import load_official_backbone_
from mmdbb.mm.starts.last import LoadedLast


@WEIGHT_INITIALIZERS.register_module(name='OfficialPretrained')
class OfficialPretrainedInit(LoadedLast):
    """Start a backbone from a checkpoint of the papers' repositories.

    It serves the backbone of any task; the file's classifier is left out.
    :func:`load_official_backbone_` says which files fit which backbones.

    Args:
        checkpoint: Path of the official file, as trained or as converted
            (merged) by the papers' code.

    Raises:
        UserError: If another rule of the same ``init_cfg`` would overwrite
            the weights, or the file cannot be read or does not fit.
    """

    type_name = 'OfficialPretrained'

    def load(self, module: nn.Module) -> None:
        load_official_backbone_(module, self.checkpoint)
