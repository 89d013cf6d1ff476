# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The tables of the study's page, written from the study's file."""

from __future__ import annotations

from pathlib import Path
from typing import (
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Sequence,
    Tuple,
)

from workshop.markers import put_between
from workshop.study import drop, report, task_plan, task_tables
from workshop.study.averages import over_networks, over_sizes
from workshop.study.follow import FOLLOW_UPS
from workshop.study.plan import (
    LONGER,
    RATES,
    SCHEDULES,
    Cell,
    cells_for,
    epochs_in_the_same_time,
)
from workshop.study.rows import Record
from workshop.study.training import CPU
from workshop.study.variants import PARTS

#: The page, from the checkout's root.
PAGE = 'docs/study.md'
#: The file of the page's results, from there too.
RESULTS = 'docs/figures/study_fashion.json'
BEGIN = '<!-- tools/study.py writes what follows: {} -->'
END = '<!-- tools/study.py wrote what stands above: {} -->'
_DASH = '-'

#: What the page shows: by size, then by memory format.
CELLS = tuple(
    cell
    for size in SCHEDULES
    for machine in (CPU, CPU._replace(channels_last=True))
    for cell in cells_for(None, [size], machine.name)
)

Lines = List[Tuple[str, ...]]
#: Rate and epochs -> accuracy on the held-out images, of one block.
Tops = Dict[Tuple[float, float], float]


def write_page(root: Path, record: Record) -> Path:
    """Write all tables between the markers of `docs/study.md`.

    Args:
        root: The checkout, with ``configs``.
        record: The study.

    Returns:
        Path: The page.

    Raises:
        UserError: If the page lacks a marker.
    """
    page = root / PAGE
    text = page.read_text('utf-8')
    demos = [
        task_plan.cell_of(name, task_plan.base_config(root, name))
        for name in task_plan.NETWORKS
    ]
    bodies = {
        **{
            name: _table(*averages(record, CELLS, PARTS['blocks']))
            for name, averages in _AVERAGES.items()
        },
        **{n: _in_cells(record, CELLS, t) for n, t in _TABLES.items()},
        **{n: _in_cells(record, demos, t) for n, t in _TASK_TABLES.items()},
    }
    for name, lines in bodies.items():
        body = '\n'.join(lines).strip('\n')
        begin, end = BEGIN.format(name), END.format(name)
        text = put_between(text, begin, end, body, page)
    page.write_text(text, 'utf-8')
    return page


def _in_cells(
    record: Record,
    cells: Sequence[Cell],
    tables: Callable[[Record, Cell], Tuple[Sequence[str], Lines]],
) -> Iterator[str]:
    """A table for each cell that has results."""
    for cell in cells:
        header, lines = tables(record, cell)
        if lines:
            yield ''
            yield f'**{cell.title}**'
            yield ''
            yield from _table(header, lines)


def _table(header: Sequence[str], lines: Lines) -> Iterator[str]:
    yield f'| {" | ".join(header)} |'
    yield '|' + '---|' * len(header)
    yield from (f'| {" | ".join(line)} |' for line in lines)


def _compared(part: str) -> Callable[[Record, Cell], tuple]:
    def tables(record: Record, cell: Cell) -> tuple:
        found = report.summarize(record, cell, PARTS[part])
        # What other parts have trained too says nothing by itself.
        if own.isdisjoint(summary.block for summary in found):
            return report.HEADER, []
        return report.HEADER, [report.cells_of(each) for each in found]

    own = {*PARTS[part].blocks} - {PARTS[part].baseline}
    if part != 'blocks':
        own -= {*PARTS['blocks'].blocks}
    return tables


def _followed(part: str) -> Callable[[Record, Cell], tuple]:
    roles = [*FOLLOW_UPS[part]]

    def tables(record: Record, cell: Cell) -> tuple:
        lines = report.follow_ups(record, cell, PARTS[part], roles)
        return report.follow_up_header(roles), lines

    return tables


def _dropped(record: Record, cell: Cell) -> tuple:
    lines = drop.drops(record, cell, PARTS['drop'], [*drop.ROLES])
    return drop.HEADER, lines


def searches(record: Record, cell: Cell) -> Tuple[Sequence[str], Lines]:
    """What the searches found in a cell, a line for each block.

    Args:
        record: The study.
        cell: The network and the number of images.

    Returns:
        tuple: The table's header and its lines.
    """
    base = cell.schedule.epochs
    twice = LONGER[-1] * base
    tops = _searched(record, cell)
    rates = [
        lr for lr in RATES if any((lr, base) in each for each in tops.values())
    ]
    lines = []
    for block, each in tops.items():
        best = max(rates, key=lambda lr: each.get((lr, base), 0))
        settings = [*((lr, base) for lr in rates), (best, twice)]
        lines.append((block, *_shown(each, settings)))
    header = (f'{lr:g}' for lr in rates)
    return ('block', *header, 'twice the epochs at the best'), lines


def searches_in_the_same_time(
    record: Record, cell: Cell
) -> Tuple[Sequence[str], Lines]:
    """As :func:`searches`, for what takes as long as the baseline."""
    lines = []
    tops = _searched(record, cell)
    for part in (PARTS['blocks'], PARTS['ablation'], PARTS['transfer']):
        for block in filter(tops.__contains__, part.blocks):
            epochs = epochs_in_the_same_time(
                record, cell, block, part.baseline
            )
            settings = [(lr, epochs) for lr in RATES]
            shown = _shown(tops[block], settings)
            line = (block, str(epochs), *shown)
            if {*shown} != {_DASH} and line not in lines:
                lines.append(line)
    return ('block', 'epochs', *(f'{lr:g}' for lr in RATES)), lines


def _searched(record: Record, cell: Cell) -> Dict[str, Tops]:
    tops: Dict[str, Tops] = {}
    for part in PARTS.values():
        tops.update(report.searched(record, cell, part))
    return tops


def _shown(tops: Tops, settings: Iterable[tuple]) -> List[str]:
    return [
        f'{tops[each]:.2f}' if each in tops else _DASH for each in settings
    ]


#: Marker -> the tables that stand there.
_TABLES: Dict[str, Callable[[Record, Cell], tuple]] = {
    'blocks': _compared('blocks'),
    'searches': searches,
    'searches in the same time': searches_in_the_same_time,
    'ablation': _compared('ablation'),
    'transfer': _compared('transfer'),
    'int8': _followed('int8'),
    'pruning': _followed('pruning'),
    'drop': _dropped,
}
_AVERAGES = {
    'averages over networks': over_networks,
    'averages over sizes': over_sizes,
}
_TASK_TABLES: Dict[str, Callable[[Record, Cell], tuple]] = {
    'tasks': task_tables.compared,
    'searches of tasks': task_tables.searches,
}
