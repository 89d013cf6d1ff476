# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""``init_cfg=dict(type='BackbonePretrained', checkpoint=...)`` in a config."""

from __future__ import annotations

from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import load_strictly
from mmdbb.mm.starts.last import LoadedLast
from mmdbb.plain.weights import state_under


@WEIGHT_INITIALIZERS.register_module(name='BackbonePretrained')
class BackbonePretrainedInit(LoadedLast):
    """Start a backbone from one's own run, all of it or not at all.

    mmengine's ``Pretrained`` with ``prefix='backbone.'`` loads what happens
    to fit, and logs the rest: of another block or another stem that is only
    a part. Here every entry must fit.

    Args:
        checkpoint: What a training with the same backbone wrote, on ImageNet
            say; a path, or what mmengine's ``CheckpointLoader`` reads.
        prefix: Under which name the backbone's entries stand.

    Raises:
        UserError: If the file is missing or holds no such entries, or they
            do not fit; or another rule of the same ``init_cfg`` would
            overwrite the weights.
    """

    type_name = 'BackbonePretrained'

    def __init__(self, checkpoint: str, prefix: str = 'backbone.') -> None:
        super().__init__(checkpoint)
        self.prefix = prefix

    def load(self, module: nn.Module) -> None:
        """Load what stands under the prefix, strictly."""
        try:
            state = state_under(self.checkpoint, self.prefix)
        except UserError as error:
            raise UserError(
                f"{error}; files of the papers' code start a backbone by "
                "type='OfficialPretrained', plain weights by "
                "type='PlainPretrained'"
            ) from error
        load_strictly(module, state, self.checkpoint)
