# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Tables of a study."""

from __future__ import annotations

import math
import statistics
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from mmdbb.mm.engine.measure import print_table
from workshop.study.images import CLASSES
from workshop.study.plan import (
    Cell,
    Setting,
    cost_of,
    search,
    search_in_the_same_time,
)
from workshop.study.rows import Cost, Record, Row, Training
from workshop.study.variants import BLOCKS, Part

#: A cell's rows of one role: block -> seed -> row.
Compared = Dict[str, Dict[int, Row]]


class Interval(NamedTuple):
    """A mean, and half of its 95 % confidence interval (Student's t).

    Attributes:
        mean: The mean.
        half: Half of the interval; infinite for a single value.
    """

    mean: float
    half: float

    def text(self, sign: str = '') -> str:
        """As tables show it."""
        text = f'{self.mean:{sign}.2f}'
        return f'{text} ± {self.half:.2f}' if self.half < math.inf else text


def interval(values: Sequence[float]) -> Interval:
    """Mean of some values, and half of its 95 % confidence interval."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, float(t.ppf(0.975, len(values) - 1)) * error)


class Summary(NamedTuple):
    """A line of a cell's table.

    Attributes:
        block: Name of the block.
        setting: Rate and epochs that the search chose.
        top1: Accuracy on the test images, per cent.
        gain: Over plain, seed by seed; None for plain.
        gain_in_same_time: The same for trainings that may take as long as
            plain; None where there are none.
        seconds: Ratio of a step's time to plain's.
        memory: Ratio of a step's memory to plain's.
        gain_a_minute: Points of ``gain`` for each minute of computing that
            the training takes longer than plain's; None unless it does.
        seeds: How many.
    """

    block: str
    setting: str
    top1: Interval
    gain: Optional[Interval]
    gain_in_same_time: Optional[Interval]
    seconds: Optional[float]
    memory: Optional[float]
    gain_a_minute: Optional[float]
    seeds: int


def compared(record: Record, cell: Cell, part: Part, role: str) -> Compared:
    """A cell's rows of one role.

    Where a block's search has ended, only those with what it chose: a file
    that was gone on with other epochs has rows of other searches, too.
    """
    chosen = {b: _chosen(record, cell, part, b, role) for b in part.blocks}
    found: Compared = {}
    for row in record.rows:
        training = row.training
        same = (training.network, training.width, training.size)
        if (
            same == (cell.network, cell.width, cell.size)
            and training.machine == cell.machine
            and training.batch == cell.schedule.batch
            and training.role == role
            and training.block in part.blocks
            and chosen[training.block]
            in (None, Setting(training.lr, training.epochs))
        ):
            found.setdefault(training.block, {})[training.seed] = row
    return found


def _chosen(
    record: Record, cell: Cell, part: Part, block: str, role: str
) -> Optional[Setting]:
    if role == 'same time':
        return search_in_the_same_time(record, cell, block, part.baseline)[1]
    return search(record, cell, block)[1]


def searched(
    record: Record, cell: Cell, part: Part
) -> Dict[str, Dict[Tuple[float, float], float]]:
    """What a cell's searches found: block -> rate and epochs -> accuracy."""
    found: Dict[str, Dict[Tuple[float, float], float]] = {}
    for row in record.rows:
        one = row.training
        if (
            one
            == cell.training(one.block, one.seed, 'search', one.lr, one.epochs)
            and one.block in part.blocks
        ):
            found.setdefault(one.block, {})[one.lr, one.epochs] = row.top1
    return {b: found[b] for b in part.blocks if b in found}


def summarize(record: Record, cell: Cell, part: Part) -> List[Summary]:
    """The lines of a cell's table, in the part's order."""
    rows = compared(record, cell, part, 'test')
    timed = compared(record, cell, part, 'same time')
    plain = rows.get(part.baseline, {})
    summaries = []
    for block in filter(rows.__contains__, part.blocks):
        by_seed = rows[block]
        first = next(iter(by_seed.values())).training
        gain = gains(by_seed, plain) if block != part.baseline else None
        costs = [cost_of(record, cell, b) for b in (block, part.baseline)]
        seconds = memory = None
        if None not in costs:
            own, base = costs
            seconds = own.milliseconds / base.milliseconds
            memory = own.megabytes / base.megabytes
        summaries.append(
            Summary(
                block,
                f'{first.lr:g}, {first.epochs:g}',
                interval([row.top1 for row in by_seed.values()]),
                gain,
                gains(timed.get(block, {}), plain),
                seconds,
                memory,
                None
                if BLOCKS[block].config == BLOCKS[part.baseline].config
                else _gain_a_minute(gain, costs, [by_seed, plain]),
                len(by_seed),
            )
        )
    return summaries


def gains(rows: Dict[int, Row], plain: Dict[int, Row]) -> Optional[Interval]:
    """Differences to plain, seed by seed; None if no seed has both."""
    found = differences(rows, plain)
    return interval([*found.values()]) if found else None


def differences(
    rows: Dict[int, Row], plain: Dict[int, Row]
) -> Dict[int, float]:
    """Seed -> points over plain, of the seeds that both have."""
    return {
        seed: row.top1 - plain[seed].top1
        for seed, row in rows.items()
        if seed in plain
    }


def _gain_a_minute(
    gain: Optional[Interval],
    costs: Sequence[Optional[Cost]],
    trained: Sequence[Dict[int, Row]],
) -> Optional[float]:
    """From steps timed in turns, which other work on the machine slows alike.

    Args:
        gain: The block's.
        costs: Of a step, of the block and the baseline.
        trained: Their rows.
    """
    if gain is None or None in costs:
        return None
    own, base = (
        cost.milliseconds * _steps(next(iter(rows.values())).training)
        for cost, rows in zip(costs, trained)
    )
    return gain.mean / ((own - base) / 60e3) if own > base else None


def _steps(training: Training) -> float:
    return training.epochs * (CLASSES * training.size // training.batch)


HEADER = (
    'block',
    'rate, epochs',
    'top-1 (%)',
    'gain',
    'gain in the same time',
    'step time',
    'memory',
    'points a minute',
    'seeds',
)


def cells_of(summary: Summary) -> Tuple[str, ...]:
    """A line as texts, one for each column of :data:`HEADER`."""
    return (
        summary.block,
        summary.setting,
        summary.top1.text(),
        summary.gain.text('+') if summary.gain else '',
        summary.gain_in_same_time.text('+')
        if summary.gain_in_same_time
        else '',
        f'{summary.seconds:.2f}' if summary.seconds else '',
        f'{summary.memory:.2f}' if summary.memory else '',
        ''
        if summary.gain_a_minute is None
        else f'{summary.gain_a_minute:+.1f}',
        str(summary.seeds),
    )


def print_study(record: Record, cells: Sequence[Cell], part: Part) -> None:
    """Print a table for each cell that has results."""
    for cell in cells:
        summaries = summarize(record, cell, part)
        if summaries:
            print_table(
                HEADER,
                [cells_of(summary) for summary in summaries],
                '± is half of a 95 % confidence interval; step time and '
                f'memory over {part.baseline}',
                cell.title,
            )


def print_follow_ups(
    record: Record, cells: Sequence[Cell], part: Part, roles: Sequence[str]
) -> None:
    """Print a table for each cell: what trained networks keep.

    Args:
        record: The study.
        cells: Networks and sizes.
        part: Whose networks.
        roles: What was done with them; the first is nothing.
    """
    for cell in cells:
        lines = follow_ups(record, cell, part, roles)
        if lines:
            print_table(
                follow_up_header(roles),
                lines,
                '± is half of a 95 % confidence interval',
                cell.title,
            )


def follow_ups(
    record: Record, cell: Cell, part: Part, roles: Sequence[str]
) -> List[Tuple[str, ...]]:
    """The lines of that table."""
    found = {role: compared(record, cell, part, role) for role in roles}
    base = found[roles[0]]
    lines = []
    for block in filter(base.__contains__, part.blocks):
        cells = [interval([r.top1 for r in base[block].values()]).text()]
        for role in roles[1:]:
            change = gains(found[role].get(block, {}), base[block])
            cells.append(change.text('+') if change else '')
        lines.append((block, *cells, str(len(base[block]))))
    return lines


def follow_up_header(roles: Sequence[str]) -> Tuple[str, ...]:
    """Titles of the columns of that table."""
    changes = (f'{role}, change' for role in roles[1:])
    return ('block', f'{roles[0]}, top-1 (%)', *changes, 'seeds')
