# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A hook of mmengine's Runner that merges each best checkpoint."""

from __future__ import annotations

import contextlib
import os
import random
from typing import Dict, Iterator, Optional, Tuple

import numpy as np
import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmdbb.errors import interruption
from mmdbb.mm.deploy.checkpoint import deploy_checkpoint
from mmdbb.mm.deploy.merge import MergeOptions
from mmdbb.mm.host_internals import best_checkpoints
from mmdbb.mm.outputs import Proof, Source, output_paths


@HOOKS.register_module()
class ReparamHook(Hook):
    """Writes the deploy files beside each best checkpoint.

    ``best_accuracy_top1_epoch_3.pth`` gets
    ``best_accuracy_top1_epoch_3_deploy.pth`` and ``.py``; both go when a
    better checkpoint takes its place. Training goes on as without the hook:
    what is merged is read from the file that ``CheckpointHook`` wrote. If it
    cannot be merged, the log says why.

    Args:
        suffix: What follows the checkpoint's name.
        ema: True to merge the averaged weights, False for those that training
            goes on with; None for the averaged ones if there are any.
        unsafe: Whether to run what code the checkpoint holds.
        options: Fields of :class:`~mmdbb.mm.outputs.Proof`, such as
            ``image_size=(64, 64)`` for the comparison, and of
            :class:`~mmdbb.mm.deploy.merge.MergeOptions`, such as
            ``fuse=True``.

    Examples:
        >>> HOOKS.build(dict(type='ReparamHook', image_size=(64, 64))).priority
        'LOWEST'
    """

    # After CheckpointHook (VERY_LOW), in whose files it reads.
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
        #: Metric -> path and score of the best checkpoint that is known.
        self.known: Optional[Dict[str, Tuple[str, object]]] = None

    def before_train(self, runner: Runner) -> None:
        """Note the best checkpoints of a run that is resumed."""
        self.known = best_checkpoints(runner)

    def after_val_epoch(
        self, runner: Runner, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        """Merge what became the best."""
        if self.known is None:  # not training
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
            with _random_numbers_kept():
                result = deploy_checkpoint(
                    # Whoever trains cannot pass --unsafe-load.
                    Source(runner.cfg, path, self.ema, self.unsafe or None),
                    self._out(path),
                    self.merging,
                    self.proof,
                    overwrite=True,
                )
        except Exception as error:
            if interruption(error) is not None:
                raise
            # Days of training must not end for want of a file that can be
            # made again.
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
    """A NamedTuple of those options that are fields of it."""
    return kind(**{n: options[n] for n in kind._fields if n in options})


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Within the context random numbers are drawn as if they were not."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        # Networks are built on the CPU.
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
