# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Hooks that refuse a checkpoint that does not fit, before mmengine loads it.

mmengine loads the entries that fit, leaves all other parameters at their
start values, and only warns in the log.
"""

from __future__ import annotations

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import describe_misfit
from mmdbb.mm.engine.resume import check_resumable, saves_optimizer
from mmdbb.mm.host_internals import loaded_state
from mmdbb.modules import unwrapped


class StartingCheckpointHook(Hook):
    """Refuses a checkpoint that a training cannot start from.

    Args:
        config: Config of the training. Its ``load_from`` names the
            checkpoint, its ``resume`` says whether to continue its training.
    """

    def __init__(self, config: Config) -> None:
        self.path, self.resume = config.load_from, config.get('resume')
        self.needs_optimizer = saves_optimizer(config)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check that the checkpoint holds everything the training needs.

        Blocks look at their own entries while they load, see
        :mod:`mmdbb.blocks.offers`.

        Raises:
            UserError: If a training is to resume, but the checkpoint lacks
                its state.
        """
        if self.resume:
            check_resumable(checkpoint, self.path, self.needs_optimizer)


class FittingCheckpointHook(Hook):
    """Refuses a checkpoint that lacks parameters of the network.

    Args:
        path: Path of the checkpoint, for messages.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Load the weights as mmengine will, and see what is missing.

        Loading itself decides, because layers may rename entries of older
        checkpoints while they load.

        Raises:
            UserError: If a parameter is missing or has another shape.
        """
        state = loaded_state(checkpoint)
        model = unwrapped(runner.model)
        try:
            missing, _ = model.load_state_dict(state, strict=False)
        except RuntimeError:  # a shape differs: in buffers it may
            missing = [
                name
                for name, value in model.state_dict().items()
                if name not in state or state[name].shape != value.shape
            ]
        if any(name in missing for name, _ in model.named_parameters()):
            misfit = describe_misfit(state, model.state_dict())
            raise UserError(
                f'{self.path} does not fit the network of the config; {misfit}'
            )
