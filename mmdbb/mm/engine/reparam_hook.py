# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A hook of mmengine's Runner that merges each best checkpoint."""

from __future__ import annotations

import contextlib
import os
from typing import Dict, Optional, Tuple

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmdbb.errors import interruption
from mmdbb.mm.deploy.checkpoint import deploy_checkpoint
from mmdbb.mm.deploy.merge import MergeOptions
from mmdbb.mm.engine.random_numbers import random_numbers_kept
from mmdbb.mm.host_internals import best_checkpoints
from mmdbb.mm.outputs import Proof, Source, output_paths


@HOOKS.register_module()
class ReparamHook(Hook):
    """Merges each best checkpoint, and writes the deploy files beside it.

    Beside ``best_accuracy_top1_epoch_3.pth`` the hook writes
    ``best_accuracy_top1_epoch_3_deploy.pth`` and ``.py``. It removes both when
    ``CheckpointHook`` has replaced the checkpoint by a better one. The hook
    reads the file that ``CheckpointHook`` wrote and never touches the network
    in training, so training goes on unchanged. If merging fails, the log says
    why.

    Args:
        suffix: Ending that is added to the checkpoint's name.
        ema: True to merge the averaged weights, False to merge the weights
            that are trained; None for the averaged ones if there are any.
        unsafe: Whether to run code that the checkpoint holds.
        options: Fields of :class:`~mmdbb.mm.outputs.Proof`, such as
            ``image_size=(64, 64)`` for the comparison, and of
            :class:`~mmdbb.mm.deploy.merge.MergeOptions`, such as
            ``fuse=True``.

    Examples:
        >>> HOOKS.build(dict(type='ReparamHook', image_size=(64, 64))).priority
        'LOWEST'
    """

    # After CheckpointHook (VERY_LOW), whose files this hook reads.
    priority = 'LOWEST'

    def __init__(
        self,
        suffix: str = '_deploy',
        ema: Optional[bool] = None,
        unsafe: bool = False,
        **options,
    ) -> None:
        if not suffix:
            raise ValueError("suffix must not be empty; got ''")
        known = (*Proof._fields, *MergeOptions._fields)
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(
                f'ReparamHook has no {", ".join(unknown)}; it has suffix, '
                f'ema, unsafe, {", ".join(known)}'
            )
        self.suffix, self.ema, self.unsafe = suffix, ema, unsafe
        self.proof = _of(Proof, options)
        self.merging = _of(MergeOptions, options)
        #: Metric -> path and score of the best checkpoint merged so far, or
        #: found at the start; None outside of training.
        self.known: Optional[Dict[str, Tuple[str, object]]] = None

    def before_train(self, runner: Runner) -> None:
        """Note the best checkpoints of a run that is resumed."""
        self.known = best_checkpoints(runner)

    def after_val_epoch(
        self, runner: Runner, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        """Merge the checkpoints that have become the best of a metric."""
        if self.known is None:  # validation without training
            return
        for metric, best in best_checkpoints(runner).items():
            old = self.known.get(metric)
            if best == old:
                continue
            self.known[metric] = best
            self._deploy(runner, best[0], old[0] if old else None)

    @master_only
    def _deploy(self, runner: Runner, path: str, old: Optional[str]) -> None:
        try:
            with random_numbers_kept():
                result = deploy_checkpoint(
                    # None, not False: with False an error message advises
                    # --unsafe-load, which tools/train.py does not have.
                    Source(runner.cfg, path, self.ema, self.unsafe or None),
                    self._out(path),
                    self.merging,
                    self.proof,
                    overwrite=True,
                )
        except Exception as error:
            if interruption(error) is not None:
                raise
            # Days of training must not end because one merge failed: the user
            # can merge the checkpoint later with tools/reparam.py.
            runner.logger.exception(f'{path} is not merged: {error}')
        else:
            runner.logger.info(
                f'{path} is merged to {result.checkpoint} (largest '
                f'difference {result.difference.largest:.2e})'
            )
        if old is not None and old != path and not os.path.exists(old):
            for output in output_paths(self._out(old)):
                with contextlib.suppress(OSError):
                    os.remove(output)

    def _out(self, path: str) -> str:
        return os.path.splitext(path)[0] + f'{self.suffix}.pth'


def _of(kind: type, options: dict) -> tuple:
    """Build a NamedTuple from those options that are its fields."""
    return kind(**{n: options[n] for n in kind._fields if n in options})
