# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run what is missing of a study, and write each result at once."""

from __future__ import annotations

import functools
import itertools
import time
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

from torch import nn

from mmdbb.errors import UserError
from workshop.study.costs import add_costs
from workshop.study.drop import Left
from workshop.study.follow import FollowUp, Trained
from workshop.study.images import (
    FashionMNIST,
    Images,
    read_fashion_mnist,
    split_for,
)
from workshop.study.networks import check_names, start, start_with
from workshop.study.plan import Cell, comparison, plain_before, runnable
from workshop.study.rows import (
    Record,
    Row,
    Training,
    read_record,
    rounded,
    write_record,
)
from workshop.study.training import CPU, Machine, Recipe, merged, top1, train
from workshop.study.variants import BLOCKS, PLAIN, Part
from workshop.study.workers import Workers


class Plan(NamedTuple):
    """What to run.

    Attributes:
        data_root: The folder that has or gets the data set.
        cells: Networks and sizes, the most telling ones first.
        part: What is compared.
        seeds: Trainings of each block that are compared.
        machine: Where to train.
        follow_ups: What is done with trained networks, by the role of the
            rows; where there is something, those rows are compared.
    """

    data_root: str
    cells: Tuple[Cell, ...]
    part: Part
    seeds: int = 5
    machine: Machine = CPU
    follow_ups: Dict[str, FollowUp] = {}


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
        if plan.follow_ups:
            found = _follow_cell(plan, cell, record, stop, jobs)
        else:
            data = split_for(_read(plan.data_root), cell.size, 0, True)
            images = data.train.to(plan.machine.device)
            add_costs(cell, plan.part.blocks, record, images, plan.machine)
            write_record(out, record)
            found = _run_cell(plan, cell, record, stop, jobs)
        for row in found:
            record.replace(row)
            write_record(out, record)
            yield row
        if time.monotonic() > stop:
            return


def _run_cell(
    plan: Plan, cell: Cell, record: Record, stop: float, jobs: int
) -> Iterator[Row]:
    """Run a cell; the caller adds each row to the record."""
    run = functools.partial(run_training, plan)
    with Workers(run, jobs) as workers:
        while True:
            for training in runnable(record, cell, plan.part, plan.seeds):
                if time.monotonic() > stop or workers.are_busy:
                    break
                before = plain_before(record, cell, training)
                workers.start(training, before)
            if not workers.running:
                return
            yield from workers.wait()


def _follow_cell(
    plan: Plan, cell: Cell, record: Record, stop: float, jobs: int
) -> Iterator[Row]:
    """Run a cell's searches, then what is done with trained networks."""
    yield from _run_cell(plan._replace(seeds=0), cell, record, stop, jobs)
    compared = comparison(record, cell, plan.part, plan.seeds, 'test')
    run = functools.partial(run_follow_ups, plan)
    with Workers(run, jobs) as workers:
        for training in itertools.chain.from_iterable(zip(*compared)):
            rows = [
                record.find(training._replace(role=role))
                for role in plan.follow_ups
            ]
            if time.monotonic() > stop:
                break
            # All of them, because changes are those of one network: another
            # machine's rounding trains another one.
            if None in rows:
                workers.start(training)
            if workers.are_busy:
                yield from workers.wait()
        while workers.running:
            yield from workers.wait()


def run_follow_ups(plan: Plan, training: Training) -> List[Row]:
    """Train one network, and do with it what the plan says.

    Args:
        plan: What to do, and where the data are.
        training: The training.

    Raises:
        UserError: If no images are left to choose a rate on.
    """
    data = images_of(plan, training)
    searching = images_of(plan, training._replace(role='search'))
    if len(searching.train.labels) < len(data.train.labels):
        raise UserError(
            f'size must leave images to choose rates on, got {training.size}'
        )
    network, _ = _trained(plan, training, data.train)

    def build(block: dict) -> nn.Module:
        seed = training.seed
        return plan.machine.take(
            start_with(training.network, block, training.width, seed)
        )

    trained = Trained(
        network, build, data, searching.test, training.seed, plan.machine
    )
    rows = []
    for role, follow_up in plan.follow_ups.items():
        begin = time.process_time()
        found = follow_up(trained)
        left = found if isinstance(found, Left) else Left(found, None)
        seconds = time.process_time() - begin
        one = training._replace(role=role)
        rows.append(Row(one, *rounded(left.top1, seconds), left.branches))
    return rows


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
) -> List[Row]:
    """Train one network from its start, and merge it.

    Args:
        plan: Where the data are, and where to train.
        training: The training.
        before: The training whose network it starts from, if there is one.

    Returns:
        list: Its row.
    """
    data = images_of(plan, training)
    network, seconds = _trained(
        plan,
        training,
        data.train,
        lambda: _trained(plan, before, data.train)[0],
    )
    found = rounded(top1(merged(network), data.test), seconds)
    return [Row(training, *found)]


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
    )
    network = plan.machine.take(network)
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
