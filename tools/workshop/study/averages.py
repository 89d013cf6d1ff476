# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What blocks gain on average over networks, and over sizes."""

from __future__ import annotations

import statistics
from typing import Dict, List, Sequence, Tuple

from workshop.study.networks import NETWORKS
from workshop.study.plan import Cell
from workshop.study.report import (
    Interval,
    compared,
    differences,
    interval,
)
from workshop.study.rows import Record
from workshop.study.variants import Part

Lines = List[Tuple[str, ...]]
#: Role of the rows -> what a column is called.
_ROLES = {'test': 'gain', 'same time': 'in the same time'}


def over_networks(
    record: Record, cells: Sequence[Cell], part: Part
) -> Tuple[Sequence[str], Lines]:
    """Averages for each size that all networks were trained with.

    Args:
        record: The study.
        cells: Networks and sizes; those without results are left out.
        part: What is compared.

    Returns:
        tuple: The table's header, and a line for each block.
    """
    groups = {}
    for cell in _trained(record, cells, part):
        groups.setdefault(f'{cell.size} images', []).append(cell)
    return _table(
        record,
        part,
        {
            name: group
            for name, group in groups.items()
            if {cell.network for cell in group} == {*NETWORKS}
        },
    )


def over_sizes(
    record: Record, cells: Sequence[Cell], part: Part
) -> Tuple[Sequence[str], Lines]:
    """As :func:`over_networks`, for each network with several sizes."""
    groups = {}
    for cell in _trained(record, cells, part):
        groups.setdefault(cell.network, []).append(cell)
    return _table(
        record,
        part,
        {
            f'{network}, {len(groups[network])} sizes': groups[network]
            for network in NETWORKS
            if len(groups.get(network, [])) > 1
        },
    )


def _trained(record: Record, cells: Sequence[Cell], part: Part) -> List[Cell]:
    return [c for c in cells if compared(record, c, part, 'test')]


def _table(
    record: Record,
    part: Part,
    groups: Dict[str, List[Cell]],
) -> Tuple[Sequence[str], Lines]:
    header, columns = ['block'], []
    for name, cells in groups.items():
        for role, title in _ROLES.items():
            columns.append(_average(record, cells, part, role))
            header.append(f'{name}: {title}')
    lines = []
    for block in part.blocks:
        gains = [column.get(block) for column in columns]
        if any(gains):
            shown = (gain.text('+') if gain else '' for gain in gains)
            lines.append((block, *shown))
    return tuple(header), lines


def _average(
    record: Record, cells: Sequence[Cell], part: Part, role: str
) -> Dict[str, Interval]:
    """Of each block that all cells have, over the seeds that all have.

    A seed gives all networks and sizes images and starts that have much in
    common, so its gains count as one value.
    """
    found = [
        (
            compared(record, cell, part, 'test').get(part.baseline, {}),
            compared(record, cell, part, role),
        )
        for cell in cells
    ]
    averages = {}
    for block in part.blocks:
        gains = [
            differences(rows.get(block, {}), plain) for plain, rows in found
        ]
        seeds = set.intersection(*map(set, gains))
        if block != part.baseline and seeds:
            averages[block] = interval(
                [statistics.fmean(g[seed] for g in gains) for seed in seeds]
            )
    return averages
