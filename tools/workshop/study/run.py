# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run what is missing of a study, and write each result at once."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import statistics
import sys
import time
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    wait,
)
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import (
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
)

import torch
from torch import nn

from mmdbb.errors import UserError
from workshop.study.images import (
    FashionMNIST,
    Images,
    read_fashion_mnist,
    split_for,
)
from workshop.study.networks import (
    BLOCKS,
    PLAIN,
    Part,
    check_names,
    start,
    start_with,
)
from workshop.study.plan import Cell, cost_of, plain_before, runnable
from workshop.study.rows import (
    Cost,
    Record,
    Row,
    Training,
    read_record,
    rounded,
    write_record,
)
from workshop.study.training import (
    CPU,
    Machine,
    Recipe,
    megabytes,
    merged,
    top1,
    train,
)

#: Steps that a cost is the median of, after three to warm up.
_COST_STEPS = 15


class Plan(NamedTuple):
    """What to run.

    Attributes:
        data_root: The folder that has or gets the data set.
        cells: Networks and sizes, the most telling ones first.
        part: What is compared.
        seeds: Trainings of each block that are compared.
        machine: Where to train.
    """

    data_root: str
    cells: Tuple[Cell, ...]
    part: Part
    seeds: int = 5
    machine: Machine = CPU


def run_study(
    plan: Plan, out: Path, minutes: float = float('inf'), jobs: int = 1
) -> Iterator[Row]:
    """Run what is missing in a file.

    Args:
        plan: What to run.
        out: JSON with the results; a study that was cut goes on from it.
        minutes: When to stop; trainings in progress are finished.
        jobs: Processes, each of which trains one network at a time.

    Yields:
        Row: Each training that this call made.

    Raises:
        UserError: If ``out`` holds something else or cannot be written, or a
            block is unknown.
    """
    check_names(blocks=plan.part.blocks)
    _check_needed(plan.part)
    record = read_record(out) if out.exists() else Record([], [])
    write_record(out, record)  # what cannot be written shows now
    stop = time.monotonic() + 60 * minutes
    for cell in plan.cells:
        _add_costs(plan, cell, record)
        write_record(out, record)
        for row in _run_cell(plan, cell, record, stop, jobs):
            record.rows.append(row)
            write_record(out, record)
            yield row


def _run_cell(
    plan: Plan, cell: Cell, record: Record, stop: float, jobs: int
) -> Iterator[Row]:
    """Run a cell; the caller adds each row to the record."""
    with _Workers(plan, jobs) as workers:
        while True:
            for training in runnable(record, cell, plan.part, plan.seeds):
                if time.monotonic() > stop or workers.are_busy:
                    break
                before = plain_before(record, cell, training)
                workers.start(training, before)
            if not workers.running:
                return
            yield from workers.wait()


class _Workers:
    """Processes that train; with one job, this process does.

    Args:
        plan: What to run.
        jobs: How many.
    """

    def __init__(self, plan: Plan, jobs: int) -> None:
        self.plan, self.jobs = plan, jobs
        self.running: Dict[Future, Training] = {}
        self.pool = None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, kind: Optional[type], *error) -> None:
        if self.pool is not None:
            if kind is not None:  # stop at once, as one process would
                for worker in active_children():
                    worker.terminate()
            self.pool.shutdown(cancel_futures=True)

    @property
    def are_busy(self) -> bool:
        """Whether each has something to do."""
        return len(self.running) >= self.jobs

    def start(self, training: Training, before: Optional[Training]) -> None:
        """Start a training, unless it runs already."""
        if training in self.running.values():
            return
        if self.jobs > 1 and self.pool is None:
            # One process imports, and is forked before it computes anything.
            context = get_context('forkserver')
            context.set_forkserver_preload([__name__])
            self.pool = ProcessPoolExecutor(self.jobs, context, _prepare)
        if self.pool is None:
            future = Future()
            future.set_result(run_training(self.plan, training, before))
        else:
            with _imports_found():
                future = self.pool.submit(
                    run_training, self.plan, training, before
                )
        self.running[future] = training

    def wait(self) -> Iterator[Row]:
        """Wait until a training is done."""
        done, _ = wait(self.running, return_when=FIRST_COMPLETED)
        for future in done:
            yield Row(self.running.pop(future), *future.result())


@contextlib.contextmanager
def _imports_found() -> Iterator[None]:
    """Let processes that start within the context import what this one can.

    Before Python 3.12 the server that forks them knows no other way.
    """
    before = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join(sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ['PYTHONPATH']
        else:
            os.environ['PYTHONPATH'] = before


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)


def _check_needed(part: Part) -> None:
    needed = [part.baseline]
    if any(BLOCKS[block].start == 'trained' for block in part.blocks):
        needed.append(PLAIN)
    for block in needed:
        if block not in part.blocks:
            raise UserError(
                f'blocks must have {block!r}, got {[*part.blocks]}'
            )


def run_training(
    plan: Plan, training: Training, before: Optional[Training] = None
) -> Tuple[float, float]:
    """Train one network from its start, and merge it.

    Args:
        plan: Where the data are, and where to train.
        training: The training.
        before: The training whose network it starts from, if there is one.

    Returns:
        tuple: Accuracy in per cent, seconds of the steps.
    """
    data = images_of(plan, training)
    network, seconds = _trained(
        plan,
        training,
        data.train,
        lambda: _trained(plan, before, data.train)[0],
    )
    return rounded(top1(merged(network), data.test), seconds)


def _trained(
    plan: Plan,
    training: Training,
    images: Images,
    plain: Optional[Callable[[], nn.Module]] = None,
) -> Tuple[nn.Module, float]:
    network = start(
        training.network,
        training.block,
        training.width,
        training.seed,
        images.images[:: max(1, len(images.labels) // 500)].cpu(),
        plain,
    ).to(plan.machine.device)
    recipe = recipe_of(training)
    seconds = train(network, images, recipe, training.seed, plan.machine)
    return network, seconds


def recipe_of(training: Training) -> Recipe:
    """How a training's network is trained."""
    return Recipe(training.lr, training.epochs, training.batch)


def images_of(plan: Plan, training: Training) -> FashionMNIST:
    """The images of one training, on the machine's device."""
    data = split_for(
        _read(plan.data_root),
        training.size,
        training.seed,
        training.role == 'search',
    )
    return FashionMNIST(*(part.to(plan.machine.device) for part in data))


#: A process reads the images once.
_read = functools.lru_cache(read_fashion_mnist)


def _add_costs(plan: Plan, cell: Cell, record: Record) -> None:
    missing = [b for b in plan.part.blocks if cost_of(record, cell, b) is None]
    if not missing:
        return
    data = split_for(_read(plan.data_root), cell.size, 0, True)
    data = data.train.to(plan.machine.device)
    blocks = list(dict.fromkeys([PLAIN, *missing]))
    found = _costs(cell, blocks, data, plan.machine)
    known = cost_of(record, cell, PLAIN)
    # On another day the machine has another speed; plain's tells by how much.
    factor = known.milliseconds / found[PLAIN].milliseconds if known else 1
    record.costs.extend(
        found[block]._replace(
            milliseconds=round(factor * found[block].milliseconds, 2)
        )
        for block in missing
    )


def _costs(
    cell: Cell, blocks: List[str], images: Images, machine: Machine
) -> Dict[str, Cost]:
    batch = cell.schedule.batch
    steps: Dict[str, Callable[[], float]] = {}
    memory = {}
    for block in blocks:
        network = start_with(
            cell.network, BLOCKS[block].config, cell.width, 0
        ).to(machine.device)
        memory[block] = megabytes(network, images, batch)
        few = images.take(torch.arange(batch, device=machine.device))
        steps[block] = functools.partial(
            train, network, few, Recipe(0.0, 1, batch), 0, machine
        )
    seconds: Dict[str, List[float]] = {block: [] for block in blocks}
    for i in range(_COST_STEPS + 3):
        for block, step in steps.items():
            taken = step()
            if i >= 3:
                seconds[block].append(taken)
    return {
        block: Cost(
            cell.network,
            cell.width,
            block,
            batch,
            cell.machine,
            1e3 * statistics.median(seconds[block]),
            round(memory[block], 3),
        )
        for block in blocks
    }
