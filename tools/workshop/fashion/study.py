# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Choose a learning rate for each block, then train with several seeds."""

from __future__ import annotations

import functools
import json
import logging
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence

import torch

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing
from workshop.fashion.images import read_fashion_mnist
from workshop.fashion.training import BLOCKS, Recipe, Result, train

#: The seed of the search; the study's own seeds count from 0.
SEARCH_SEED = 1000


class Plan(NamedTuple):
    """What to train.

    Attributes:
        data_root: The folder that has or gets the data set.
        blocks: Some of :data:`~workshop.fashion.training.BLOCKS`.
        rates: Learning rates to choose from.
        seeds: Trainings of each block with its rate.
        recipe: How to train; the rate in it is replaced.
        search_epochs: Epochs of the trainings that choose the rate.
        device: Where to train.
        jobs: Processes that share the device while rates are chosen. The
            trainings that are timed always run one at a time.
    """

    data_root: str
    blocks: Sequence[str]
    rates: Sequence[float]
    seeds: int
    recipe: Recipe
    search_epochs: int
    device: torch.device
    jobs: int = 1


class _Task(NamedTuple):
    block: str
    seed: int
    recipe: Recipe
    searched: bool


def run_study(plan: Plan, out: Path) -> Iterator[Result]:
    """Train what is missing in a file, and write each result there at once.

    Args:
        plan: What to train.
        out: JSON with the results; an interrupted study goes on from it.

    Yields:
        Result: Each training that this call made.

    Raises:
        UserError: If ``out`` holds something else, or a block is unknown.
    """
    unknown = sorted(set(plan.blocks) - set(BLOCKS))
    if unknown:
        raise UserError(f'unknown blocks {unknown}; allowed: {list(BLOCKS)}')
    done = read_results(out) if out.exists() else []
    _write(out, done)  # what cannot be written shows now
    recipe = plan.recipe._replace(epochs=plan.search_epochs)
    tasks = [
        _Task(block, SEARCH_SEED, recipe._replace(lr=rate), True)
        for block in plan.blocks
        for rate in plan.rates
    ]
    yield from _run(plan, tasks, done, out, plan.jobs)
    best = best_rates(done, recipe)
    tasks = [
        _Task(block, seed, plan.recipe._replace(lr=best[block]), False)
        for seed in range(plan.seeds)
        for block in plan.blocks
    ]
    yield from _run(plan, tasks, done, out, 1)


def _run(
    plan: Plan, tasks: List[_Task], done: List[Result], out: Path, jobs: int
) -> Iterator[Result]:
    known = {_Task(r.block, r.seed, r.recipe, r.searched) for r in done}
    left = [task for task in tasks if task not in known]
    if not left:
        return
    _read(plan.data_root)  # one process downloads
    train_one = functools.partial(_train, plan.data_root, plan.device)
    if jobs == 1:
        results = map(train_one, left)
    else:
        results = _in_processes(train_one, left, jobs)
    for result in results:
        done.append(result)
        _write(out, done)
        yield result


def _in_processes(
    train_one: Callable[[_Task], Result], tasks: List[_Task], jobs: int
) -> Iterator[Result]:
    """Train several networks at a time; each result comes when it is there."""
    context = get_context('spawn')  # CUDA cannot be used in a forked process
    with ProcessPoolExecutor(
        jobs, context, logging.disable, (logging.INFO,)
    ) as pool:
        futures = [pool.submit(train_one, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()


def _train(data_root: str, device: torch.device, task: _Task) -> Result:
    data = _read(data_root)
    if task.searched:
        data = data.for_search()
    data = type(data)(*(part.to(device) for part in data))
    return train(
        task.block, task.seed, task.recipe, data, device, task.searched
    )


#: A process reads the images once.
_read = functools.lru_cache(read_fashion_mnist)


def best_rates(results: List[Result], recipe: Recipe) -> Dict[str, float]:
    """The learning rate of each block with the best validation accuracy.

    Args:
        results: Results, those of the search among them.
        recipe: The recipe of the search; its rate does not matter.
    """
    best: Dict[str, Result] = {}
    for result in results:
        same = result.recipe._replace(lr=recipe.lr) == recipe
        if result.searched and same:
            other = best.get(result.block)
            if other is None or result.top1 > other.top1:
                best[result.block] = result
    return {block: result.recipe.lr for block, result in best.items()}


def read_results(out: Path) -> List[Result]:
    """Read the results of a study.

    Raises:
        UserError: If the file holds something else.
    """
    try:
        rows = json.loads(out.read_text())['results']
        return [
            Result(**dict(row, recipe=Recipe(**row['recipe']))) for row in rows
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{out} holds no results of this study; choose another name'
        ) from error


def _write(out: Path, results: List[Result]) -> None:
    rows = [dict(r._asdict(), recipe=r.recipe._asdict()) for r in results]
    text = json.dumps(dict(results=rows), indent=1)
    with all_or_nothing(str(out), overwrite=True) as drafts:
        Path(drafts[0]).write_text(f'{text}\n')
