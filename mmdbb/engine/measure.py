# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What tools measure and print: latency in turns, tables."""

from __future__ import annotations

import statistics
import time
from typing import Callable, List, Optional, Tuple

import torch

#: Characters in a line of the widest table.
WIDEST = 10_000


@torch.no_grad()
def interleaved_latency(
    calls: List[Callable[[], object]], rounds: int = 15
) -> List[float]:
    """The median seconds of each call on one thread, all called in turn.

    What else the machine does then touches all of them alike. The first two
    rounds do not count.
    """
    seconds = [[] for _ in calls]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for round_ in range(rounds + 2):
            for call, taken in zip(calls, seconds):
                start = time.perf_counter()
                call()
                if round_ >= 2:
                    taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return [statistics.median(taken) for taken in seconds]


def print_table(
    header: Tuple[str, ...],
    rows: List[Tuple[str, ...]],
    caption: Optional[str] = None,
    title: Optional[str] = None,
) -> None:
    """Print rows of text as a table, numbers to the right.

    Into a file or a pipe it is as wide as it needs to be; on a terminal that
    is too narrow, cells take more lines, and lose nothing.

    Args:
        header: A title for each column.
        rows: As many cells each.
        caption: Stands below the table.
        title: Stands above it.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=title, caption=caption, caption_justify='left')
    for place, name in enumerate(header):
        justify = 'right' if place else 'left'
        table.add_column(name, justify=justify, overflow='fold')
    for row in rows:
        table.add_row(*row)
    console = Console()
    whole = console.options.update(width=WIDEST)
    width = Measurement.get(console, whole, table).maximum
    if not console.file.isatty():
        console.width = width
    table.show_lines = console.width < width
    console.print(table)
