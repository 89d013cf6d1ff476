# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which trainings a study needs, given those that have been run.

Every function looks at the record only. So a study that was cut goes on
where it was, and everybody who has the file can see why a training was run.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

from workshop.study.networks import NETWORKS, check_names
from workshop.study.rows import Cost, Record, Training
from workshop.study.training import CHANNELS_LAST
from workshop.study.variants import BLOCKS, PLAIN, Part

#: Learning rates, each about three times the one before. A search begins
#: with the three in the middle, and goes on as long as the best is at an end.
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST_RATES = (0.03, 0.1, 0.3)
#: Factors of the epochs, tried at the best rate.
LONGER = (1, 2)
#: The seed of searches; those that are compared count from 0.
SEARCH_SEED = 1000


class Schedule(NamedTuple):
    """What depends on the number of images.

    Attributes:
        batch: Images in a step.
        epochs: Passes over the images; the search may double it.
    """

    batch: int
    epochs: int


#: Training images a class -> schedule.
SCHEDULES = {
    30: Schedule(50, 40),
    300: Schedule(100, 10),
    # As many steps as with 300, to see what more images change.
    3000: Schedule(100, 1),
}


#: Network -> channels of its first stage: narrow, for a CPU.
WIDTHS = {'RepVGG': 8, 'ResNet-18': 8, 'MobileNet-V1': 8}


class Cell(NamedTuple):
    """A network and a number of images: what a table is made for.

    Attributes:
        network: Name of the network.
        width: Channels of its first stage.
        size: Training images a class; 0 for all images of a demo.
        schedule: Batch and epochs.
        machine: Device and precision.
    """

    network: str
    width: int
    size: int
    schedule: Schedule
    machine: str

    @property
    def title(self) -> str:
        """As tables and pictures name it."""
        images = f'{self.size} images a class'
        if not self.size:
            images = "the demo's images"
        if self.machine.endswith(CHANNELS_LAST):
            images += CHANNELS_LAST
        return f'{self.network}, width {self.width}, {images}'

    def training(
        self, block: str, seed: int, role: str, lr: float, epochs: float
    ) -> Training:
        """A training in this cell."""
        return Training(
            self.network,
            self.width,
            block,
            self.size,
            seed,
            role,
            lr,
            epochs,
            self.schedule.batch,
            self.machine,
        )


class Setting(NamedTuple):
    """What a search chooses.

    Attributes:
        lr: The learning rate.
        epochs: Passes over the images.
    """

    lr: float
    epochs: float


def search(
    record: Record, cell: Cell, block: str
) -> Tuple[List[Training], Optional[Setting]]:
    """The trainings that a block's search still needs, or what it chose.

    Returns:
        tuple: Trainings to run next, and None; or an empty list, and the
        setting with the best accuracy on the held-out images.
    """
    if BLOCKS[block].start == 'trained':
        needed, setting = search(record, cell, PLAIN)
        if setting is None:
            return needed, None
    base = cell.schedule.epochs
    needed, best = _search_rate(record, cell, block, base)
    if best is None:
        return needed, None
    settings = [Setting(best.lr, factor * base) for factor in LONGER]
    needed, tops = _tops(record, cell, block, settings)
    if needed:
        return needed, None
    return [], max(settings, key=tops.__getitem__)


def _search_rate(
    record: Record, cell: Cell, block: str, epochs: float
) -> Tuple[List[Training], Optional[Setting]]:
    """As :func:`search`, for a given number of epochs."""
    tried = list(FIRST_RATES)
    while True:
        settings = [Setting(lr, epochs) for lr in tried]
        needed, tops = _tops(record, cell, block, settings)
        if needed:
            return needed, None
        best = max(settings, key=tops.__getitem__)
        further = beyond(best.lr, tried, RATES)
        if further is None:
            return [], best
        tried = sorted([*tried, further])


def beyond(
    best: float, tried: Sequence[float], allowed: Sequence[float]
) -> Optional[float]:
    """What a search tries next.

    Args:
        best: The best of what was tried.
        tried: Some neighbours among the allowed ones.
        allowed: All that may be tried, in order.

    Returns:
        float: The neighbour of the best, if that is at an end of those
        tried; else None.
    """
    place = allowed.index(best)
    if best == min(tried) and place > 0:
        return allowed[place - 1]
    if best == max(tried) and place + 1 < len(allowed):
        return allowed[place + 1]
    return None


def _tops(
    record: Record, cell: Cell, block: str, settings: List[Setting]
) -> Tuple[List[Training], dict]:
    needed, tops = [], {}
    for setting in settings:
        training = cell.training(block, SEARCH_SEED, 'search', *setting)
        row = record.find(training)
        if row is None:
            needed.append(training)
        else:
            tops[setting] = row.top1
    return needed, tops


def cost_of(record: Record, cell: Cell, block: str) -> Optional[Cost]:
    """What a step of a block costs, None if it was not measured."""
    wanted = (cell.network, cell.width, block, cell.schedule.batch)
    for cost in record.costs:
        if cost[:5] == (*wanted, cell.machine):
            return cost
    return None


def search_in_the_same_time(
    record: Record, cell: Cell, block: str, baseline: str = PLAIN
) -> Tuple[List[Training], Optional[Setting]]:
    """As :func:`search`, for as many epochs as take the baseline's time.

    The rate is searched anew, because fewer steps want another one.

    Returns:
        tuple: An empty list and None where the baseline's time is not known
        yet, or the block is no block.
    """
    epochs = epochs_in_the_same_time(record, cell, block, baseline)
    if epochs is None:
        return [], None
    return _search_rate(record, cell, block, epochs)


def epochs_in_the_same_time(
    record: Record, cell: Cell, block: str, baseline: str
) -> Optional[float]:
    """How many epochs take a block about as long as the baseline's training.

    Whole ones, or tenths where they are fewer than three; None as in
    :func:`search_in_the_same_time`.
    """
    if BLOCKS[block].config == BLOCKS[PLAIN].config:
        return None
    plain = search(record, cell, baseline)[1]
    costs = [cost_of(record, cell, b) for b in (baseline, block)]
    if None in (plain, *costs):
        return None
    epochs = plain.epochs * costs[0].milliseconds / costs[1].milliseconds
    return round(epochs) if epochs >= 3 else max(0.1, round(epochs, 1))


def comparison(
    record: Record, cell: Cell, part: Part, seeds: int, role: str
) -> List[List[Training]]:
    """For each block the trainings that are compared; none before searches."""
    found = []
    for block in part.blocks:
        if role == 'test':
            setting = search(record, cell, block)[1]
        else:
            setting = search_in_the_same_time(
                record, cell, block, part.baseline
            )[1]
        if setting is not None:
            found.append(
                [
                    cell.training(block, seed, role, *setting)
                    for seed in range(seeds)
                ]
            )
    return found


def runnable(
    record: Record, cell: Cell, part: Part, seeds: int
) -> List[Training]:
    """What can be run now in a cell, the first first; empty if it is done.

    First all searches, then the comparison seed by seed, so that what exists
    when a study is cut compares blocks on the same seeds. The same for the
    comparison in the same time.
    """
    needed = [
        training
        for block in part.blocks
        for training in search(record, cell, block)[0]
    ]
    if needed:
        return needed
    for role in ('test', 'same time'):
        needed += [
            training
            for trainings in zip(*comparison(record, cell, part, seeds, role))
            for training in trainings
            if record.find(training) is None
        ]
        if role == 'test' and seeds:
            needed += [
                training
                for block in part.blocks
                for training in search_in_the_same_time(
                    record, cell, block, part.baseline
                )[0]
            ]
    return needed


def plain_before(
    record: Record, cell: Cell, training: Training
) -> Optional[Training]:
    """The training whose network a training starts from, if there is one."""
    if BLOCKS[training.block].start != 'trained':
        return None
    lr, epochs = search(record, cell, PLAIN)[1]
    return training._replace(block=PLAIN, lr=lr, epochs=epochs)


def cells_for(
    networks: Optional[Sequence[str]],
    sizes: Sequence[int],
    machine: str,
    width: Optional[int] = None,
    batch: Optional[int] = None,
    epochs: Optional[int] = None,
) -> Tuple[Cell, ...]:
    """The cells of a study, small sizes of all networks first.

    Args:
        networks: Names; None for all.
        sizes: Training images a class. One without a schedule of its own
            takes that of the next smaller size.
        machine: Device and precision.
        width: Channels of the first stage; None for each network's own.
        batch: Images in a step; None for that of the schedule.
        epochs: Passes over the images; None for those of the schedule.
    """
    check_names(networks or ())
    cells = []
    for size in sizes:
        known = [s for s in SCHEDULES if s <= size] or [min(SCHEDULES)]
        schedule = SCHEDULES[max(known)]
        schedule = schedule._replace(
            batch=batch or schedule.batch, epochs=epochs or schedule.epochs
        )
        cells += [
            Cell(name, width or WIDTHS[name], size, schedule, machine)
            for name in networks or NETWORKS
        ]
    return tuple(cells)
