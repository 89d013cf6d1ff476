# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Tables of the demo's detector and segmentor."""

from __future__ import annotations

from typing import List, Sequence, Tuple

from mmdbb.mm.engine.measure import print_table
from workshop.study import report
from workshop.study.plan import Cell
from workshop.study.rows import Record
from workshop.study.task_plan import NETWORKS, PART, time_ratios
from workshop.study.variants import Part

Lines = List[Tuple[str, ...]]


def compared(
    record: Record, cell: Cell, part: Part = PART
) -> Tuple[Sequence[str], Lines]:
    """What blocks gain in a task, a line for each.

    Args:
        record: The study.
        cell: The task's.
        part: What is compared.

    Returns:
        tuple: The table's header and its lines.
    """
    rows = report.compared(record, cell, part, 'test')
    ratios = time_ratios(record, cell, part)
    lines = []
    for found in report.summarize(record, cell, part):
        rate = next(iter(rows[found.block].values())).training.lr
        gains = (found.gain, found.gain_in_same_time)
        ratio = ratios.get(found.block)
        lines.append(
            (
                found.block,
                f'{rate:g}',
                found.top1.text(),
                *(gain.text('+') if gain else '' for gain in gains),
                f'{ratio:.2f}' if ratio else '',
                str(found.seeds),
            )
        )
    figure = f'{NETWORKS[cell.network].figure} (%)'
    columns = ('gain', 'gain in the same time', 'training time', 'seeds')
    return ('block', 'rate', figure, *columns), lines


def searches(record: Record, cell: Cell) -> Tuple[Sequence[str], Lines]:
    """What the searches found in a task, as :func:`compared`."""
    found = report.searched(record, cell, PART)
    rates = sorted({rate for tops in found.values() for rate, _ in tops})
    lines = []
    for block, tops in found.items():
        # The comparison in the same time has a shorter search of its own.
        for length in sorted({length for _, length in tops}, reverse=True):
            cells = (tops.get((rate, length)) for rate in rates)
            shown = ('-' if top is None else f'{top:.2f}' for top in cells)
            lines.append((block, str(length), *shown))
    header = (NETWORKS[cell.network].length, *(f'{r:g}' for r in rates))
    return ('block', *header), lines


def print_tasks(record: Record, cells: Sequence[Cell], part: Part) -> None:
    """Print a table for each task that has results."""
    for cell in cells:
        header, lines = compared(record, cell, part)
        if lines:
            note = (
                '± is half of a 95 % confidence interval; training time over '
                f'{part.baseline}'
            )
            print_table(header, lines, note, cell.title)
