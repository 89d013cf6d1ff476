# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which trainings of the demo's detector and segmentor a study needs.

As :mod:`workshop.study.plan` for classifiers: only the record decides.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Dict, Generator, Iterator, List, NamedTuple, Sequence

from mmengine.config import Config

from workshop.demo.run import TASKS
from workshop.study.plan import SEARCH_SEED, Cell, Schedule, beyond
from workshop.study.report import compared
from workshop.study.rows import Record, Training
from workshop.study.variants import PLAIN, Part


class Task(NamedTuple):
    """One of the demo's.

    Attributes:
        name: Its name there.
        figure: What its evaluator measures.
        unit: The evaluator's unit in per cent.
        length: What its training is counted in.
    """

    name: str
    figure: str
    unit: float
    length: str


#: Name in tables -> the demo's task.
NETWORKS = {
    'ATSS': Task('detection', 'box mAP', 100.0, 'epochs'),
    'Semantic FPN': Task('segmentation', 'mIoU', 1.0, 'iterations'),
}
#: What the detector and the segmentor are compared with.
PART = Part((PLAIN, 'DBB', 'OREPA'))
#: The demo's learning rate is multiplied by one of these. A search begins with
#: three, and goes on as long as the best is at an end.
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
FIRST_FACTORS = (0.3, 1.0, 3.0)
_MACHINE = 'CPU, one thread, float32'
_WIDTH = 16


class TaskPlan(NamedTuple):
    """What to run.

    Attributes:
        home: The folder that holds ``configs``.
        data_root: The folder that has or gets the data sets.
        networks: Some of :data:`NETWORKS`.
        part: What is compared.
        seeds: Trainings of each block that are compared.
        images: To train and to validate on; None for the demo's numbers.
    """

    home: Path
    data_root: str
    networks: Sequence[str]
    part: Part
    seeds: int = 5
    images: Sequence = (None, None)


def cell_of(network: str, cfg: Config) -> Cell:
    """The cell of a task's rows; the demo's whole data set has size 0."""
    loop = cfg.train_cfg
    schedule = Schedule(
        cfg.train_dataloader.batch_size, loop[length_key(loop)]
    )
    return Cell(network, _WIDTH, 0, schedule, _MACHINE)


def length_key(loop: dict) -> str:
    """Where the config of a training loop says how long it is."""
    return 'max_epochs' if 'max_epochs' in loop else 'max_iters'


def base_config(home: Path, network: str) -> Config:
    """The demo's config of a task."""
    name = TASKS[NETWORKS[network].name].config
    return Config.fromfile(Path(home, 'configs', 'demo', name))


def trainings(
    plan: TaskPlan, network: str, record: Record
) -> Iterator[Training]:
    """All that a network needs, in order; later ones depend on earlier.

    First each block's search, then the comparison seed by seed. Then both
    again for trainings that take as long as the baseline's.
    """
    cfg = base_config(plan.home, network)
    cell = cell_of(network, cfg)
    rate = cfg.optim_wrapper.optimizer.lr
    rates = {factor: round(factor * rate, 6) for factor in FACTORS}
    lengths = dict.fromkeys(plan.part.blocks, cell.schedule.epochs)
    for role in ('test', 'same time'):
        found: List[Training] = []
        for block, epochs in lengths.items():
            first = cell.training(block, SEARCH_SEED, 'search', rate, epochs)
            found.append((yield from _search(record, first, rates)))
        for seed in range(plan.seeds):
            for training in found:
                yield training._replace(seed=seed, role=role)
        lengths = {
            block: max(1, round(cell.schedule.epochs / ratio))
            for block, ratio in time_ratios(record, cell, plan.part).items()
            if block != plan.part.baseline
        }


def _search(
    record: Record, first: Training, rates: Dict[float, float]
) -> Generator[Training, None, Training]:
    """A search's trainings; returns the best once all are in the record."""
    further, tops = [*FIRST_FACTORS], {}
    while further:
        for factor in further:
            training = first._replace(lr=rates[factor])
            yield training
            tops[factor] = record.find(training).top1
        best = max(tops, key=tops.__getitem__)
        further = [f for f in [beyond(best, [*tops], FACTORS)] if f]
    return first._replace(lr=rates[best])


def time_ratios(record: Record, cell: Cell, part: Part) -> Dict[str, float]:
    """How many times the baseline's training time the blocks take.

    Returns:
        dict: Block -> median of the ratios, seed by seed: these trainings
        took turns, so other work on the machine slowed both alike. Without
        blocks that share no seed with the baseline.
    """
    rows = compared(record, cell, part, 'test')
    base = rows.get(part.baseline, {})
    found = {}
    for block in filter(rows.__contains__, part.blocks):
        ratios = [
            row.seconds / base[seed].seconds
            for seed, row in rows[block].items()
            if seed in base
        ]
        if ratios:
            found[block] = statistics.median(ratios)
    return found
