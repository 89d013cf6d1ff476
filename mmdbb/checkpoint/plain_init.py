# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""``init_cfg=dict(type='PlainPretrained', checkpoint=...)`` in a config."""

from __future__ import annotations

from typing import Optional

from mmengine.logging import print_log
from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from mmdbb.blocks.from_plain import BRANCH_SCALE
from mmdbb.checkpoint.plain import load_plain_weights_
from mmdbb.errors import UserError


@WEIGHT_INITIALIZERS.register_module(name='PlainPretrained')
class PlainPretrainedInit:
    """Start a network with blocks from the weights of the plain network.

    What mmengine does for the type ``Pretrained`` by its name, that is, to
    load last of all, this does by itself.

    Args:
        checkpoint: Any checkpoint that mmengine's ``CheckpointLoader`` reads.
        prefix: Load only what stands under this name, e.g. ``'backbone.'``.
        branch_scale: See :func:`load_plain_weights_`.

    Raises:
        UserError: If another rule of the same ``init_cfg`` would overwrite
            the weights, or they do not fit.
    """

    def __init__(
        self,
        checkpoint: str,
        prefix: Optional[str] = None,
        branch_scale: float = BRANCH_SCALE,
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.branch_scale = branch_scale

    def __call__(self, module: nn.Module) -> None:
        """Fill the module, last of all that initialises it."""
        initializing = hasattr(module, '_params_init_info')
        if initializing:
            self._refuse_later_rules(module)
            self._initialize_children(module)
        print_log(
            f'start from plain weights: {self.checkpoint}', logger='current'
        )
        load_plain_weights_(
            module, self.checkpoint, self.prefix, self.branch_scale
        )
        if initializing:
            # The hosts' own last steps (zero_init_residual) ask for this
            # type, and leave pretrained weights alone.
            module.init_cfg = dict(
                type='Pretrained',
                checkpoint=self.checkpoint,
                prefix=self.prefix,
            )
            update_init_info(
                module,
                init_info=f'{type(self).__name__}: start from the plain '
                f'weights {self.checkpoint}',
            )

    @staticmethod
    def _refuse_later_rules(module: nn.Module) -> None:
        rules = module.init_cfg
        if isinstance(rules, dict):
            return
        types = [rule['type'] for rule in rules]
        last = types[-1]
        if last not in ('PlainPretrained', PlainPretrainedInit) or any(
            getattr(t, '__name__', t) in ('Pretrained', 'PretrainedInit')
            for t in types
        ):
            raise UserError(
                "init_cfg of type 'PlainPretrained' must be the last of the "
                f"list, without a 'Pretrained' beside it; got {types}"
            )

    @staticmethod
    def _initialize_children(module: nn.Module) -> None:
        """What mmengine would do after this rule, and so overwrite it."""
        for child in module.children():
            if hasattr(child, 'init_weights') and not getattr(
                child, 'is_init', False
            ):
                child.init_weights()
                child.is_init = True
