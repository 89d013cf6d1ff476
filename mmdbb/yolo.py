# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train YOLO's models with blocks by the trainers of ultralytics.

These trainers build their model themselves, then at once the optimizer and
the averaged copy of the model (EMA); no callback runs in between. They take a
model that their method ``get_model`` returns, so that is where blocks go in.
This file imports nothing of ultralytics.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from mmdbb.insert import insert_blocks_
from mmdbb.reparam import find_blocks

__all__ = ['TrainerWithBlocks']

#: Height and width in pixels of the image that the inserting runs on: a
#: multiple of the largest stride of all models (64).
_SIZE = 128


class TrainerWithBlocks:
    """Mixin for a trainer of ultralytics, whose model gets blocks.

    Attributes:
        block: Config of the block, ``dict(type='DBB')`` by default.
        where: Decides by name and convolution what becomes a block, see
            :func:`~mmdbb.insert_blocks_`.

    Examples:
        A trainer in a file of its own, which several GPUs need::

            from ultralytics.models.yolo.detect import DetectionTrainer

            from mmdbb.yolo import TrainerWithBlocks


            class Trainer(TrainerWithBlocks, DetectionTrainer):
                block = dict(type='DBB')
    """

    block: Optional[dict] = None
    where: Any = None

    def get_model(
        self,
        cfg: Any = None,
        weights: Optional[nn.Module] = None,
        verbose: bool = True,
    ) -> nn.Module:
        """Build the model, give it weights and blocks.

        Args:
            cfg: The model's YAML file, or its content.
            weights: A model to take weights from, with or without blocks.
            verbose: Whether to print the model.

        Returns:
            nn.Module: The model with blocks. If ``weights`` has no blocks, in
            eval mode it computes the same as a plain model with them.

        Raises:
            ValueError: If ``weights`` has other blocks than the trainer.
        """
        resumed = weights is not None and bool(find_blocks(weights))
        plain = None if resumed else weights
        trainer: Any = super()  # of ultralytics
        model = trainer.get_model(cfg, plain, verbose)
        channels = getattr(model, 'yaml', {}).get('channels', 3)
        names = insert_blocks_(
            model,
            self.block,
            type(self).where,  # self.where would be a method
            example=torch.rand(1, channels, _SIZE, _SIZE),
        )
        if weights is not None and resumed:
            _check_same_blocks(model, weights)
            model.load(weights)
        if verbose:
            print(f'mmdbb: {len(names)} convolutions are blocks')
        return model


def _check_same_blocks(model: nn.Module, weights: nn.Module) -> None:
    """Raise unless two models have the same blocks under the same names.

    ``model.load`` would skip what differs, so it would start at random.
    """
    own, others = (
        {
            f'{name}.{entry}'
            for name, block in find_blocks(net).items()
            for entry in block.state_dict()
        }
        for net in (model, weights)
    )
    if own != others:
        example = min(own ^ others)
        raise ValueError(
            'the checkpoint has other blocks than this trainer: '
            f'{example} is only in the '
            f'{"trainer" if example in own else "checkpoint"}; set block and '
            'where as in the training before, or merge it first '
            '(mmdbb.merge_back_)'
        )
