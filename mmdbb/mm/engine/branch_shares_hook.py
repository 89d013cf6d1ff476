# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A hook of mmengine's Runner that logs what branches add to kernels."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean
from typing import Any, Dict, List, Mapping, Optional, Sequence

from mmengine.dist import master_only
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from mmdbb.modules import unwrapped
from mmdbb.shares import BlockShares, model_shares

#: The figures of :class:`~mmdbb.shares.BranchShare` that can be logged.
FIGURES = ('projection', 'share', 'norm')


@HOOKS.register_module()
class BranchSharesHook(Hook):
    """Logs while training what each branch adds to the merged kernels.

    The figures go to all backends of the visualizer (files, TensorBoard,
    Weights & Biases), at the start, every ``interval`` iterations and at the
    end: ``projection/LAYER/BRANCH`` for each branch, and
    ``projection/mean/BRANCH`` for each kind of branch over all layers. The
    hook reads weights and statistics only; it changes nothing, draws no
    random number, and works in the main process alone.

    Args:
        interval: Iterations between two entries in the log.
        figures: Which figures to log, of ``'projection'`` (the part of the
            merged kernel that the branch supplies; a layer's add up to 1),
            ``'share'`` (length of the branch's kernel, divided by that of the
            merged one) and ``'norm'`` (that length itself).
        each: Whether to log each layer, and not the means only.
        ema: Whether to look at the averaged weights of ``EMAHook`` instead
            of those that are trained.

    Raises:
        ValueError: If ``interval`` is no whole number from 1 on, or
            ``figures`` has others.

    Examples:
        >>> HOOKS.build(dict(type='BranchSharesHook', interval=100)).interval
        100
    """

    priority = 'LOW'

    def __init__(
        self,
        interval: int = 500,
        figures: Sequence[str] = ('projection',),
        each: bool = True,
        ema: bool = False,
    ) -> None:
        whole = isinstance(interval, int) and not isinstance(interval, bool)
        if not whole or interval < 1:
            raise ValueError(
                'interval must be a whole number of iterations from 1 on, got '
                f'{interval!r}'
            )
        if isinstance(figures, str) or not figures:
            raise ValueError(
                f'figures must be a list of {", ".join(FIGURES)}; got '
                f'{figures!r}'
            )
        unknown = [name for name in figures if name not in FIGURES]
        if unknown:
            raise ValueError(
                f'figures must be some of {", ".join(FIGURES)}; got '
                f'{", ".join(map(repr, unknown))}'
            )
        self.interval = interval
        self.figures, self.each, self.ema = tuple(figures), each, ema
        self._last: Optional[int] = None
        self._off = False

    def before_train(self, runner: Runner) -> None:
        """Log how the branches start."""
        self._log(runner)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Log every ``interval`` iterations."""
        if self.every_n_train_iters(runner, self.interval):
            self._log(runner, after=1)

    def after_train(self, runner: Runner) -> None:
        """Log how the branches are at the end."""
        self._log(runner)

    @master_only
    def _log(self, runner: Runner, after: int = 0) -> None:
        step = runner.iter + after
        if self._off or self._last == step:
            return
        self._last = step
        try:
            found = model_shares(self._model(runner))
        except ValueError as error:
            self._stop(runner, f'branches cannot be measured: {error}')
            return
        if not found:
            self._stop(runner, 'the network has no block with branches')
            return
        scalars = self._scalars(found)
        if scalars:
            runner.visualizer.add_scalars(scalars, step=step)

    def _stop(self, runner: Runner, reason: str) -> None:
        # Days of training must not end for a line in the log.
        self._off = True
        runner.logger.warning(f'BranchSharesHook logs nothing: {reason}')

    def _model(self, runner: Runner) -> nn.Module:
        if not self.ema:
            return unwrapped(runner.model)
        hooks = [h for h in runner.hooks if isinstance(h, EMAHook)]
        averaged = getattr(hooks[0], 'ema_model', None) if hooks else None
        if averaged is None:
            raise ValueError('ema=True needs an EMAHook in custom_hooks')
        return unwrapped(averaged.module)

    def _scalars(self, found: Mapping[str, BlockShares]) -> Dict[str, float]:
        scalars: Dict[str, float] = {}
        for figure in self.figures:
            kinds: Dict[str, List[float]] = defaultdict(list)
            for layer, shares in found.items():
                for name, branch in shares.branches.items():
                    value = getattr(branch, figure)
                    if not math.isfinite(value):
                        continue
                    kinds[name].append(value)
                    if self.each:
                        scalars[f'{figure}/{layer}/{name}'] = value
            for name, values in kinds.items():
                scalars[f'{figure}/mean/{name}'] = fmean(values)
        return scalars
