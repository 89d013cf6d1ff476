# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Evaluate a network, or a substitute for it, by the config's evaluator."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from typing import Callable, Iterator, List, NamedTuple, Optional

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import Tensor

from mmdbb.errors import UserError
from mmdbb.mm.engine.launch import build_runner
from mmdbb.mm.evaluation.substitutes import running_instead
from mmdbb.mm.host_internals import drop_hooks, name_run

#: The main figures of the evaluators for classes, boxes and segments.
FIGURES = ('accuracy/top1', 'coco/bbox_mAP', 'mIoU')
#: Evaluators that print figures between 0 and 1; the others print per cent.
SHARES = ('coco/', 'pascal_voc/', 'cityscapes/', 'lvis/')


class Figure(NamedTuple):
    """One number of an evaluator.

    Attributes:
        name: The evaluator's name for the number.
        points: The number in hundredths (per cent), also where the evaluator
            prints a share of 1.
    """

    name: str
    points: float


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
    with tempfile.TemporaryDirectory(prefix='mmdbb-') as folder:
        cfg.work_dir = folder
        with contextlib.redirect_stdout(None):  # pycocotools prints
            runner = build_runner(cfg)
            drop_hooks(runner)
            try:
                yield runner
            finally:
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
    name: Optional[str] = None,
) -> Figure:
    """Run the test loop of a config, and take one figure from its evaluator.

    Args:
        runner: The config's runner, with the trained network.
        network: A substitute that computes the outputs instead of the
            runner's network, see
            :func:`mmdbb.mm.evaluation.substitutes.running_instead`; None to
            evaluate the runner's own.
        name: The figure to take. By default the first of :data:`FIGURES` that
            the evaluator gives; if it gives none of them, its first figure.

    Returns:
        Figure: The figure, in hundredths. If the evaluator gives no figures
        at all, as COCO's does when nothing was detected, it is 0.

    Raises:
        UserError: If the evaluator gives other figures, but not this one.
    """
    model = runner.model
    mode = model.training
    model.eval()
    instead = running_instead(model, network) if network else None
    try:
        with instead or contextlib.nullcontext():
            # Not Runner.test(): it would load a checkpoint first.
            found = dict(runner.test_loop.run())
    finally:
        model.train(mode)
    if name is None:
        name = next((n for n in FIGURES if n in found), None)
    if name is None:
        name = next(iter(found), FIGURES[1])
    if name not in found and found:
        raise UserError(
            f'the evaluator gives no {name!r}; it gives: {", ".join(found)}'
        )
    value = float(found.get(name, 0.0))
    return Figure(name, value * (100 if name.startswith(SHARES) else 1))
