# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A picture of a study: every seed's difference to the baseline."""

from __future__ import annotations

import math
from typing import Dict, Iterator, List, Sequence, Tuple

from mmdbb.mm.engine.measure import check_picture
from workshop.study.plan import Cell
from workshop.study.report import (
    Compared,
    compared,
    differences,
    interval,
)
from workshop.study.rows import Record, Row
from workshop.study.variants import Part


def draw_study(
    record: Record, cells: Sequence[Cell], part: Part, path: str
) -> None:
    """Draw the difference to plain of every seed, and their means.

    What blocks gain and what they gain in plain's training time stand side
    by side, each on a scale of its own; what nobody trained for is left out.

    Args:
        record: The study.
        cells: A row of panels for each that has results.
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
    shown = [
        each
        for each in _SHOWN
        if any(compared(record, cell, part, each[0]) for cell in cells)
    ]
    figure, panels = plt.subplots(
        max(1, len(cells)),
        max(1, len(shown)),
        squeeze=False,
        sharey='row',
        figsize=(10, 0.7 + 2.6 * max(1, len(cells))),
    )
    for cell, row in zip(cells, panels):
        for (role, colour, name), axes in zip(shown, row):
            _draw_cell(record, cell, part, role, axes, color=colour)
            axes.set_title(f'{cell.title}:\n{name}', fontsize=9)
    figure.tight_layout()
    # Without dates and random names the same results give the same file.
    metadata = dict(Date=None) if path.endswith('.svg') else None
    matplotlib.rcParams['svg.hashsalt'] = 'study'
    figure.savefig(path, metadata=metadata)
    plt.close(figure)


#: Role of the rows, colour and title of the panels in a row.
_SHOWN = (
    ('test', 'C0', 'each with its best setting'),
    ('same time', 'C1', "in plain's training time"),
)


def _draw_cell(
    record: Record, cell: Cell, part: Part, role: str, axes, color: str
) -> None:
    rows = compared(record, cell, part, 'test')
    plain = rows.get(part.baseline, {})
    blocks = [b for b in part.blocks if b in rows and b != part.baseline]
    axes.axvline(0, color='0.4', linewidth=1)
    for place, found in _differences(
        compared(record, cell, part, role), plain, blocks
    ):
        mean, half = interval(found)
        places = [place] * len(found)
        axes.plot(found, places, 'o', color=color, alpha=0.3, ms=4)
        axes.errorbar(
            mean,
            place,
            xerr=half if half < math.inf else None,
            fmt='s',
            capsize=3,
            color=color,
        )
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.set_xlabel(f'points over {part.baseline}: each seed, mean, 95 %')
    axes.grid(axis='x', alpha=0.3)


def _differences(
    rows: Compared, plain: Dict[int, Row], blocks: List[str]
) -> Iterator[Tuple[int, List[float]]]:
    for place, block in enumerate(blocks):
        found = differences(rows.get(block, {}), plain)
        if found:
            yield place, [*found.values()]
