# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""``init_cfg=dict(type='PlainPretrained', checkpoint=...)`` in a config."""

from __future__ import annotations

from typing import Optional

from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from mmdbb.mm.starts.last import LoadedLast
from mmdbb.plain.blocks import BRANCH_SCALE
from mmdbb.plain.weights import load_plain_weights_


@WEIGHT_INITIALIZERS.register_module(name='PlainPretrained')
class PlainPretrainedInit(LoadedLast):
    """Start a network with blocks from the weights of the plain network.

    The weights are loaded after all other initialisation, as by mmengine's
    ``Pretrained``.

    Args:
        checkpoint: Any checkpoint that mmengine's ``CheckpointLoader`` reads.
        prefix: Load only the entries whose names begin with this, e.g.
            ``'backbone.'``; None for all of them.
        branch_scale: Start value of the gammas of all branches but ``kxk``,
            as a share of the gamma of ``kxk``, see :mod:`mmdbb.plain.blocks`.

    Raises:
        UserError: If another rule of the same ``init_cfg`` would overwrite
            the weights, or they do not fit.
    """

    type_name = 'PlainPretrained'

    def __init__(
        self,
        checkpoint: str,
        prefix: Optional[str] = None,
        branch_scale: float = BRANCH_SCALE,
    ) -> None:
        super().__init__(checkpoint)
        self.prefix = prefix
        self.branch_scale = branch_scale

    def load(self, module: nn.Module) -> None:
        load_plain_weights_(
            module, self.checkpoint, self.prefix, self.branch_scale
        )
