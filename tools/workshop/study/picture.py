# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A picture of a study: every seed's difference to the baseline."""

from __future__ import annotations

import math
from typing import Dict, Iterator, List, Sequence, Tuple

from mmdbb.mm.engine.measure import check_picture
from workshop.study.plan import Cell
from workshop.study.report import Compared, compared, interval
from workshop.study.rows import Record, Row
from workshop.study.variants import Part


def draw_study(
    record: Record, cells: Sequence[Cell], part: Part, path: str
) -> None:
    """Draw the difference to plain of every seed, and their means.

    Args:
        record: The study.
        cells: A panel for each that has results.
        part: What is compared.
        path: The picture to write, in a format that matplotlib knows.

    Raises:
        UserError: If matplotlib is missing or does not know the format.
    """
    check_picture(path)
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    cells = [cell for cell in cells if compared(record, cell, part, 'test')]
    figure, panels = plt.subplots(
        max(1, len(cells)),
        squeeze=False,
        figsize=(7, 0.7 + 2.3 * max(1, len(cells))),
    )
    for cell, axes in zip(cells, panels[:, 0]):
        _draw_cell(record, cell, part, axes)
    figure.tight_layout()
    # Without dates and random names the same results give the same file.
    metadata = dict(Date=None) if path.endswith('.svg') else None
    matplotlib.rcParams['svg.hashsalt'] = 'study'
    figure.savefig(path, metadata=metadata)
    plt.close(figure)


def _draw_cell(record: Record, cell: Cell, part: Part, axes) -> None:
    plain = compared(record, cell, part, 'test').get(part.baseline, {})
    rows = compared(record, cell, part, 'test')
    blocks = [b for b in part.blocks if b in rows and b != part.baseline]
    axes.axvline(0, color='0.4', linewidth=1)
    for role, shift, colour, name in (
        ('test', -0.15, 'C0', 'each with its best setting'),
        ('same time', 0.15, 'C1', "in plain's training time"),
    ):
        label = name
        for place, differences in _differences(
            compared(record, cell, part, role), plain, blocks
        ):
            mean, half = interval(differences)
            axes.plot(
                differences,
                [place + shift] * len(differences),
                'o',
                color=colour,
                alpha=0.3,
                markersize=4,
            )
            axes.errorbar(
                mean,
                place + shift,
                xerr=half if half < math.inf else None,
                fmt='s',
                capsize=3,
                color=colour,
                label=label,
            )
            label = None
    axes.set_yticks(range(len(blocks)), blocks)
    axes.invert_yaxis()
    axes.set_title(
        f'{cell.network}, {cell.size} training images a class', fontsize=10
    )
    axes.set_xlabel('points of top-1 over plain: each seed, mean, 95 %')
    axes.grid(axis='x', alpha=0.3)
    axes.legend(fontsize=7)


def _differences(
    rows: Compared, plain: Dict[int, Row], blocks: List[str]
) -> Iterator[Tuple[int, List[float]]]:
    for place, block in enumerate(blocks):
        found = [
            row.top1 - plain[seed].top1
            for seed, row in rows.get(block, {}).items()
            if seed in plain
        ]
        if found:
            yield place, found
