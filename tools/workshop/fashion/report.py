# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Print the results of the study as a table."""

from __future__ import annotations

import statistics
from typing import Dict, List

from mmdbb.mm.engine.measure import print_table
from workshop.demo.study import mean_and_half
from workshop.fashion.training import Result


def print_results(results: List[Result]) -> None:
    """Print a row for each block: accuracy, gain, time and memory.

    Args:
        results: From :func:`workshop.fashion.study.read_results`; those of
            the search do not count.
    """
    by_block: Dict[str, Dict[int, Result]] = {}
    for result in results:
        if not result.searched:
            by_block.setdefault(result.block, {})[result.seed] = result
    plain = by_block.get('plain', {})
    rows = []
    for block, trained in by_block.items():
        gains = [
            result.top1 - plain[seed].top1
            for seed, result in trained.items()
            if seed in plain and block != 'plain'
        ]
        rows.append(
            (
                block,
                ', '.join(
                    sorted({f'{r.recipe.lr:g}' for r in trained.values()})
                ),
                _interval([r.top1 for r in trained.values()]),
                _interval(gains, '+') if gains else '',
                _ratio(trained, plain, 'seconds'),
                _ratio(trained, plain, 'peak_mb'),
            )
        )
    seeds = len({r.seed for r in results if not r.searched})
    print_table(
        ('block', 'rate', 'top-1 (%)', 'over plain', 'time', 'memory'),
        rows,
        f'{seeds} seeds each; ± is half of a 95 % confidence interval; time '
        'and memory over plain',
    )


def _interval(values: List[float], sign: str = '') -> str:
    mean, half = mean_and_half(values)
    return f'{mean:{sign}.2f} ± {half:.2f}'


def _ratio(
    trained: Dict[int, Result], plain: Dict[int, Result], field: str
) -> str:
    """Median of a field over plain's, both in words of one device."""
    own, base = (
        [getattr(result, field) for result in results.values()]
        for results in (trained, plain)
    )
    if not base or not statistics.median(base):
        return ''
    return f'{statistics.median(own) / statistics.median(base):.2f}'
