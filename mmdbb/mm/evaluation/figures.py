# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The config's own evaluator, on the network or on what replaces it."""

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

#: The figure that is reported, by evaluator.
FIGURES = ('accuracy/top1', 'coco/bbox_mAP', 'mIoU')
#: Evaluators whose figures lie within 0 and 1.
SHARES = ('coco/', 'pascal_voc/', 'cityscapes/', 'lvis/')


class Figure(NamedTuple):
    """One number of an evaluator.

    Attributes:
        name: The evaluator's name for it.
        points: Its value in hundredths, whatever the evaluator prints.
    """

    name: str
    points: float


@contextlib.contextmanager
def quiet_runner(cfg: Config) -> Iterator[Runner]:
    """A config's runner that says little and leaves no files.

    Args:
        cfg: A config with a test dataloader and evaluator.

    Raises:
        UserError: If the config has neither.
    """
    for name in ('test_dataloader', 'test_evaluator'):
        if cfg.get(name) is None:
            raise UserError(f'the config has no {name}')
    cfg = copy.deepcopy(cfg)
    cfg.update(load_from=None, resume=False, log_level='ERROR')
    name_run(cfg, f'mmdbb_{id(cfg)}')
    with tempfile.TemporaryDirectory(prefix='mmdbb-') as folder:
        cfg.work_dir = folder
        with contextlib.redirect_stdout(None):  # pycocotools talks
            runner = build_runner(cfg)
            drop_hooks(runner)
            try:
                yield runner
            finally:
                _close(runner)


def _close(runner: Runner) -> None:
    """Let go of the log file, which its folder cannot outlive everywhere."""
    if isinstance(runner.logger, MMLogger):
        for handler in list(runner.logger.handlers):
            handler.close()
            runner.logger.removeHandler(handler)


def evaluate(
    runner: Runner,
    network: Optional[Callable[[Tensor], List[Tensor]]] = None,
    name: Optional[str] = None,
) -> Figure:
    """Run the test loop of a config.

    Args:
        runner: With the trained network.
        network: What runs in the network's place, see
            :func:`mmdbb.mm.evaluation.substitutes.running_instead`.
        name: Which figure; by default the first of :data:`FIGURES` that the
            evaluator gives, or its first.

    Returns:
        Figure: In hundredths. A figure that an evaluator leaves out, as
        COCO's does when nothing was detected, counts as 0.

    Raises:
        UserError: If the evaluator has no such figure.
    """
    model = runner.model
    mode = model.training
    model.eval()
    instead = running_instead(model, network) if network else None
    try:
        with instead or contextlib.nullcontext():
            # As Runner.test(), which would load a checkpoint again.
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
