# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Evaluate a network, or a substitute for it, by the config's evaluator."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from typing import Callable, Iterator, List, Optional

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import Tensor

from mmdbb.errors import UserError
from mmdbb.mm.engine.launch import build_runner
from mmdbb.mm.engine.random_numbers import random_numbers_kept
from mmdbb.mm.evaluation.images import explained_loading
from mmdbb.mm.evaluation.metric import FIGURES, Figure, Metric
from mmdbb.mm.evaluation.substitutes import running_instead
from mmdbb.mm.host_internals import drop_hooks, end_workers, name_run
from mmdbb.modules import in_eval_mode, unwrapped


@contextlib.contextmanager
def quiet_runner(cfg: Config) -> Iterator[Runner]:
    """Build a config's runner that prints only errors and leaves no files.

    Args:
        cfg: A config with a test dataloader and evaluator; unchanged.

    Yields:
        Runner: The runner, without hooks. Its work folder is temporary.

    Raises:
        UserError: If the config lacks one of the two.
    """
    for name in ('test_dataloader', 'test_evaluator'):
        if cfg.get(name) is None:
            raise UserError(f'the config has no {name}')
    cfg = copy.deepcopy(cfg)
    cfg.update(load_from=None, resume=False, log_level='ERROR')
    name_run(cfg, f'mmdbb_{id(cfg)}')
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_numbers_kept())  # the runner sets a seed
        folder = tempfile.TemporaryDirectory(prefix='mmdbb-')
        cfg.work_dir = stack.enter_context(folder)
        with contextlib.redirect_stdout(None):  # pycocotools prints
            runner = build_runner(cfg)
            drop_hooks(runner)
            try:
                yield runner
            finally:
                end_workers(runner)
                _close(runner)


def _close(runner: Runner) -> None:
    """Close the log file: Windows cannot remove a folder with an open file."""
    if isinstance(runner.logger, MMLogger):
        for handler in list(runner.logger.handlers):
            handler.close()
            runner.logger.removeHandler(handler)


def evaluate(
    runner: Runner,
    network: Optional[Callable[[Tensor], List[Tensor]]] = None,
    metric: Optional[Metric] = None,
) -> Figure:
    """Run the test loop of a config, and take one figure from its evaluator.

    Args:
        runner: The config's runner, with the trained network. It stays
            unchanged.
        network: A substitute that computes the outputs instead of the
            runner's network, see
            :func:`mmdbb.mm.evaluation.substitutes.running_instead`; None to
            evaluate the runner's own.
        metric: The figure to take. By default, or without a name, the first of
            :data:`~mmdbb.mm.evaluation.metric.FIGURES` that the evaluator
            gives; if it gives none of them, its first figure.

    Returns:
        Figure: The figure. If the evaluator gives no figures at all, as
        COCO's does when nothing was detected, it is 0.

    Raises:
        UserError: If the evaluator gives other figures, but not this one, or
            an image cannot be read.
    """
    model, metric = unwrapped(runner.model), metric or Metric()
    instead = running_instead(model, network) if network else None
    with contextlib.ExitStack() as stack:
        # TestLoop.run puts the network into eval mode, and leaves it so.
        stack.enter_context(in_eval_mode(runner.model))
        stack.enter_context(random_numbers_kept())  # loaders draw seeds
        stack.enter_context(instead or contextlib.nullcontext())
        stack.enter_context(explained_loading(runner.test_loop, 'test'))
        # Not Runner.test(): it would load a checkpoint first.
        found = dict(runner.test_loop.run())
    name = metric.name
    if name is None:
        name = next((n for n in FIGURES if n in found), None)
    if name is None:
        name = next(iter(found), 'coco/bbox_mAP')
    if name not in found and found:
        raise UserError(
            f'the evaluator gives no {name!r}; it gives: {", ".join(found)}'
        )
    value = float(found.get(name, 0.0))
    return Figure(metric.of(name, value), value)
