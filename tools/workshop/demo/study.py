# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The same small network with each block, many seeds, few training images.

Real digits (MNIST-5k), mmengine's Runner, one budget for all: does training
with branches help, and by how much more than another seed would?
"""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import (
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np
from mmengine.config import Config
from mmengine.runner import Runner

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing
from mmdbb.mm.engine.measure import check_picture, print_table
from workshop.demo.prepare import prepare

#: Name in tables -> the block of one and the same network.
BLOCKS: Dict[str, dict] = {
    'plain': dict(type='Conv2d'),
    'ACB': dict(type='ACB'),
    'RepVGGConv': dict(type='RepVGGConv'),
    'DBB': dict(type='DBB'),
    'OREPA': dict(type='OREPA'),
}
#: Of backbone and head alike: that of the papers' networks. What has no block
#: then starts equal with each of them.
START = dict(type='TorchDefault')
CONFIG = Path('configs', 'demo', 'resnet18_dbb_mnist5k.py')
METRIC = 'accuracy/top1'


class Budget(NamedTuple):
    """What every training gets.

    Attributes:
        images: Training images a class; which ones the seed decides.
        epochs: Passes over them.
        batch: Images in a step.
        lr: Learning rate of the demo's optimizer.
    """

    images: int = 30
    epochs: int = 40
    batch: int = 50
    lr: float = 3e-3


class Result(NamedTuple):
    """One training.

    Attributes:
        block: One of :data:`BLOCKS`.
        seed: Of the images, the weights and the order.
        top1: Accuracy on the 1000 validation images, per cent.
    """

    block: str
    seed: int
    top1: float


class Summary(NamedTuple):
    """All trainings of one block.

    Attributes:
        block: One of :data:`BLOCKS`.
        mean: Of the accuracies.
        half: Half of the 95 % confidence interval of the mean.
        gain: Mean of the differences to plain, seed by seed; None for plain.
        gain_half: Half of its 95 % confidence interval.
    """

    block: str
    mean: float
    half: float
    gain: Optional[float]
    gain_half: Optional[float]


def run_study(
    home: Path,
    out: Path,
    budget: Budget,
    data_root: str = 'data',
    blocks: Tuple[str, ...] = tuple(BLOCKS),
    seeds: int = 10,
    work_dir: str = 'work_dirs/study',
    images: Sequence[Optional[int]] = (None, None),
    overwrite: bool = False,
) -> Iterator[Result]:
    """Train what is missing in ``out``, and write each result there at once.

    Args:
        home: The folder that holds ``configs``.
        out: JSON with the budget and the results; an interrupted study is
            taken up where it stopped.
        budget: What every training gets.
        data_root: The folder that has or gets the data set.
        blocks: Some of :data:`BLOCKS`.
        seeds: Trainings of each block.
        work_dir: For logs.
        images: In the data set, to train and to validate on, if not the
            usual numbers.
        overwrite: Whether ``out`` is replaced if it is no study of this
            budget. One that is, is taken up all the same.

    Yields:
        Result: Each training, those read from ``out`` too.

    Raises:
        UserError: If ``out`` holds something else, or cannot be written, or
            a number is out of range.
    """
    _check(blocks, seeds, budget)
    done = _taken_up(out, budget, overwrite)
    _write(out, budget, done)  # what cannot be written shows now
    folder = prepare('classification', data_root, 0, *images)
    known = {(r.block, r.seed): r for r in done}
    for seed in range(seeds):
        for block in blocks:
            result = known.get((block, seed))
            if result is None:
                cfg = study_config(home, folder, block, seed, budget)
                cfg.work_dir = str(Path(work_dir, f'{block}_{seed}'))
                result = Result(block, seed, train_network(cfg))
                done.append(result)
                _write(out, budget, done)
            yield result


def study_config(
    home: Path, folder: Path, block: str, seed: int, budget: Budget
) -> Config:
    """The demo's config with another block, one start, and fewer images."""
    cfg = Config.fromfile(home / CONFIG)
    cfg.model.backbone.update(block=dict(BLOCKS[block]), init_cfg=dict(START))
    cfg.model.head.init_cfg = dict(START)
    cfg.optim_wrapper.optimizer.lr = budget.lr
    cfg.train_dataloader.update(
        batch_size=budget.batch, num_workers=0, persistent_workers=False
    )
    cfg.val_dataloader.update(num_workers=0, persistent_workers=False)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(folder)
    cfg.train_dataloader.dataset.indices = chosen_images(
        folder, budget.images, seed
    )
    cfg.param_scheduler[-1].T_max = budget.epochs
    cfg.train_cfg = dict(
        by_epoch=True, max_epochs=budget.epochs, val_interval=budget.epochs
    )
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=-1)
    cfg.log_level = 'WARNING'
    cfg.randomness = dict(seed=seed)
    cfg.experiment_name = f'study_{block}_{seed}_{os.getpid()}'
    for part in ('dataloader', 'cfg', 'evaluator'):
        cfg.pop(f'test_{part}')
    return cfg


def chosen_images(folder: Path, images: int, seed: int) -> List[int]:
    """Which training images a seed gets: so many of each class.

    Args:
        folder: The data set.
        images: How many a class.
        seed: Of the choice.

    Returns:
        list: Their places in the data set's own order.

    Raises:
        UserError: If a class has fewer.
    """
    counts = [
        sum(1 for _ in path.iterdir())
        for path in sorted((folder / 'train').iterdir())
        if path.is_dir()
    ]
    if images > min(counts):
        raise UserError(
            f'a class of {folder} has {min(counts)} training images, asked '
            f'for {images}'
        )
    random = np.random.default_rng(seed)
    chosen, start = [], 0
    for count in counts:
        places = random.choice(count, images, replace=False)
        chosen += sorted(int(start + place) for place in places)
        start += count
    return chosen


def train_network(cfg: Config) -> float:
    """Train with mmengine's Runner; the accuracy at the end, per cent."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner.message_hub.get_scalar(f'val/{METRIC}').current()


def summarize(results: List[Result]) -> List[Summary]:
    """Means with their 95 % confidence intervals, and gains over plain."""
    by_block: Dict[str, Dict[int, float]] = {}
    for result in results:
        by_block.setdefault(result.block, {})[result.seed] = result.top1
    plain = by_block.get('plain', {})
    summaries = []
    for block, tops in by_block.items():
        gain = gain_half = None
        gains = [top - plain[s] for s, top in tops.items() if s in plain]
        if block != 'plain' and gains:
            gain, gain_half = mean_and_half(gains)
        mean, half = mean_and_half(list(tops.values()))
        summaries.append(Summary(block, mean, half, gain, gain_half))
    return summaries


def mean_and_half(values: List[float]) -> Tuple[float, float]:
    """Mean, and half of its confidence interval by Student's t."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * error


def read_results(out: Path, budget: Budget) -> List[Result]:
    """Read results of this very budget.

    Raises:
        UserError: If the file is of another budget, or of something else.
    """
    hint = 'choose another name or pass --force'
    try:
        report = json.loads(out.read_text())
        found = Budget(**report['budget'])
        results = [Result(**r) for r in report['results']]
        ours = report == _report(found, results)
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f'{out} holds no results of a study; {hint}')
    if found != budget and results:
        raise UserError(
            f'{out} holds results of another budget: {found}; {hint}'
        )
    return results


def _taken_up(out: Path, budget: Budget, overwrite: bool) -> List[Result]:
    """What of a study is done."""
    if not out.exists() or out.is_dir():  # writing refuses folders
        return []
    try:
        return read_results(out, budget)
    except UserError:
        if not overwrite:
            raise
        return []


def _report(budget: Budget, results: List[Result]) -> dict:
    return dict(
        budget=budget._asdict(), results=[r._asdict() for r in results]
    )


def _write(out: Path, budget: Budget, results: List[Result]) -> None:
    text = json.dumps(_report(budget, results), indent=1)
    with all_or_nothing(str(out), overwrite=True) as drafts:
        Path(drafts[0]).write_text(f'{text}\n')


def print_study(results: List[Result]) -> None:
    """Print a row for each block: its mean, and its gain over plain.

    Args:
        results: From :func:`run_study`.
    """

    def with_half(mean: float, half: float, sign: str = '') -> str:
        text = f'{mean:{sign}.2f}'
        return f'{text} ± {half:.2f}' if math.isfinite(half) else text

    summaries = summarize(results)
    seeds = len({result.seed for result in results})
    caption = (
        f'{seeds} seeds each; ± is half of a 95 % confidence interval'
        if seeds > 1
        else 'one seed each, which gives no confidence interval'
    )
    print_table(
        ('block', 'top-1 (%)', 'over plain, seed by seed'),
        [
            (
                s.block,
                with_half(s.mean, s.half),
                '' if s.gain is None else with_half(s.gain, s.gain_half, '+'),
            )
            for s in summaries
        ],
        caption,
    )


def draw_study(results: List[Result], path: str) -> None:
    """Draw every training as a point, and means with their intervals.

    Args:
        results: From :func:`run_study`.
        path: The picture to write, in a format that matplotlib knows.

    Raises:
        UserError: If matplotlib is missing or does not know the format.
    """
    check_picture(path)
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5))
    summaries = summarize(results)
    for row, summary in enumerate(summaries):
        tops = [r.top1 for r in results if r.block == summary.block]
        axes.plot(tops, [row] * len(tops), 'o', color='0.7', zorder=1)
        axes.errorbar(summary.mean, row, xerr=summary.half, fmt='s', capsize=4)
    axes.set_yticks(range(row + 1), [s.block for s in summaries])
    axes.invert_yaxis()
    axes.set_xlabel('top-1 (%): each seed, mean, 95 % confidence interval')
    axes.grid(axis='x', alpha=0.3)
    figure.tight_layout()
    # Without dates and random names the same results give the same file.
    metadata = dict(Date=None) if path.endswith('.svg') else None
    matplotlib.rcParams['svg.hashsalt'] = 'study'
    figure.savefig(path, metadata=metadata)
    plt.close(figure)


def _check(blocks: Tuple[str, ...], seeds: int, budget: Budget) -> None:
    unknown = sorted(set(blocks) - set(BLOCKS))
    if unknown:
        raise UserError(f'unknown blocks {unknown}; allowed: {list(BLOCKS)}')
    numbers = dict(budget._asdict(), seeds=seeds)
    for name, value in numbers.items():
        if not value > 0:
            raise UserError(f'{name} must be greater than 0, got {value}')
