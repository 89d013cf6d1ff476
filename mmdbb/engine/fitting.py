# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Refusing checkpoints that do not fit, before mmengine loads them.

mmengine loads what fits, leaves the rest as it was made and warns in the log.
"""

from __future__ import annotations

import re

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmdbb.checkpoint.files import describe_misfit
from mmdbb.checkpoint.load import holds_blocks
from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks


class StartingCheckpointHook(Hook):
    """Refuses a checkpoint that a training cannot start from.

    Args:
        config: The training's, with ``load_from`` and ``resume``.
    """

    def __init__(self, config: Config) -> None:
        self.path, self.resume = config.load_from, config.get('resume')
        self.blocks_have_weights = _starts_from_file(config.model)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look for what a training needs.

        Raises:
            UserError: If it has nothing to resume from, or nothing for any
                block.
        """
        if self.resume and 'message_hub' not in checkpoint:
            raise UserError(
                f'cannot resume from {self.path}: it holds weights and no '
                'state of a training'
            )
        if self.blocks_have_weights:
            return
        model = unwrapped(runner.model)
        left = [b for b in find_blocks(model).values() if not b.deploy]
        if left and not holds_blocks(_state_of(checkpoint), model):
            raise UserError(
                f'{self.path} is of a plain or merged network: it has '
                f'nothing for the {len(left)} blocks of this one, which '
                'would start at random; plain weights are given to blocks '
                "by init_cfg=dict(type='PlainPretrained', ...), see "
                'docs/plain_weights.md'
            )


class FittingCheckpointHook(Hook):
    """Refuses a checkpoint that lacks parameters of the network.

    Args:
        path: Path of the checkpoint, for the message.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare names and shapes before the weights are copied.

        Raises:
            UserError: If a parameter is missing or has another shape.
        """
        state = _state_of(checkpoint)
        model = unwrapped(runner.model)
        for name, parameter in model.named_parameters():
            if name not in state or state[name].shape != parameter.shape:
                misfit = describe_misfit(state, model.state_dict())
                raise UserError(
                    f'{self.path} does not fit the network of the config; '
                    f'{misfit}'
                )


def _starts_from_file(node) -> bool:
    """Whether an ``init_cfg`` in a model's config names a checkpoint."""
    if isinstance(node, (list, tuple)):
        return any(map(_starts_from_file, node))
    if not isinstance(node, dict):
        return False
    rules = node.get('init_cfg') or []
    rules = [rules] if isinstance(rules, dict) else rules
    return any('checkpoint' in rule for rule in rules) or _starts_from_file(
        list(node.values())
    )


def _state_of(checkpoint: dict) -> dict:
    """The weights of a checkpoint as mmengine reads them."""
    state = checkpoint.get('state_dict', checkpoint)
    return {re.sub('^module[.]', '', name): v for name, v in state.items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network in what several GPUs and augmentation put around it."""
    while isinstance(getattr(model, 'module', None), nn.Module):
        model = model.module
    return model
