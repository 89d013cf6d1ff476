# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Tables of the demo's detector and segmentor."""

from __future__ import annotations

import statistics
from typing import List, Sequence, Tuple

from mmdbb.mm.engine.measure import print_table
from workshop.study import report
from workshop.study.plan import Cell
from workshop.study.rows import Record
from workshop.study.tasks import NETWORKS, PART
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
    base = rows.get(part.baseline, {})
    lines = []
    for found in report.summarize(record, cell, part):
        rate = next(iter(rows[found.block].values())).training.lr
        # Trained one after the other with each seed, so other work on the
        # machine slows both alike.
        ratios = [
            row.seconds / base[seed].seconds
            for seed, row in rows[found.block].items()
            if seed in base
        ]
        lines.append(
            (
                found.block,
                f'{rate:g}',
                found.top1.text(),
                found.gain.text('+') if found.gain else '',
                f'{statistics.median(ratios):.2f}' if ratios else '',
                str(found.seeds),
            )
        )
    figure = f'{NETWORKS[cell.network].figure} (%)'
    return ('block', 'rate', figure, 'gain', 'training time', 'seeds'), lines


def searches(record: Record, cell: Cell) -> Tuple[Sequence[str], Lines]:
    """What the searches found in a task, as :func:`compared`."""
    found = report.searched(record, cell, PART)
    rates = sorted({rate for tops in found.values() for rate, _ in tops})
    lines = []
    for block, tops in found.items():
        by_rate = {rate: top for (rate, _), top in tops.items()}
        shown = (
            f'{by_rate[rate]:.2f}' if rate in by_rate else '-'
            for rate in rates
        )
        lines.append((block, *shown))
    return ('block', *(f'{rate:g}' for rate in rates)), lines


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
