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
    """Start a backbone from a training of your own; every entry must fit.

    mmengine's ``Pretrained`` with ``prefix='backbone.'`` loads the entries
    that happen to fit, and only logs the others. With a checkpoint of another
    block or another stem, a part of the backbone would then start at random.

    Args:
        checkpoint: Checkpoint of a training with the same backbone, on
            ImageNet say: a path, or an address that mmengine's
            ``CheckpointLoader`` reads.
        prefix: Beginning of the names of the backbone's entries.

    Raises:
        UserError: If the file is missing, has no entries with this prefix, or
            they do not fit; or if another rule of the same ``init_cfg`` would
            overwrite the weights.
    """

    type_name = 'BackbonePretrained'

    def __init__(self, checkpoint: str, prefix: str = 'backbone.') -> None:
        super().__init__(checkpoint)
        self.prefix = prefix

    def load(self, module: nn.Module) -> None:
        """Load the entries with the prefix, strictly.

        Args:
            module: The backbone.
        """
        try:
            state = state_under(self.checkpoint, self.prefix)
        except UserError as error:
            raise UserError(
                f"{error}; for files of the papers' code use "
                "type='OfficialPretrained', for plain weights "
                "type='PlainPretrained'"
            ) from error
        load_strictly(module, state, self.checkpoint)
