# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Helpers of tools that measure: latencies, tables, report files, plots."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Tuple

import torch

from mmdbb.errors import UserError, require_packages
from mmdbb.files.atomic import all_or_nothing

#: Characters in a line of the widest table.
WIDEST = 10_000


@torch.no_grad()
def interleaved_latency(
    calls: List[Callable[[], object]], rounds: int = 15
) -> List[float]:
    """Measure the median latency of each call, in seconds on one thread.

    A round runs every call once. So other load on the machine slows all calls
    alike, and their ratios stay right. Two rounds of warm-up do not count.

    Args:
        calls: The functions to time.
        rounds: How many times each is timed.

    Returns:
        list: A median for each call.
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
    """Print a table; all columns but the first are aligned to the right.

    In a file or a pipe the table is as wide as it needs to be. On a terminal
    that is too narrow, long cells wrap, so that no text is cut off.

    Args:
        header: A title for each column.
        rows: For each row a text for each column.
        caption: Text below the table.
        title: Text above the table.
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


@contextlib.contextmanager
def report_files(
    *paths: Optional[str], overwrite: bool = False
) -> Iterator[List[Optional[str]]]:
    """Write optional report files, all of them or none.

    Args:
        paths: The files to write; None for a report that the user did not
            ask for.
        overwrite: Whether existing files may be replaced.

    Yields:
        list: For each path a temporary one to write to, which is moved to its
        place at the end; None for None.

    Raises:
        UserError: Before any work, if a file exists and may not be replaced,
            or cannot be written, see
            :func:`~mmdbb.files.atomic.all_or_nothing`.
    """
    asked_for = [path for path in paths if path is not None]
    with contextlib.ExitStack() as stack:
        drafts = iter(())
        if asked_for:
            written = all_or_nothing(*asked_for, overwrite=overwrite)
            drafts = iter(stack.enter_context(written))
        yield [None if path is None else next(drafts) for path in paths]


def check_picture(path: Optional[str]) -> None:
    """Raise early if a picture cannot be drawn.

    Args:
        path: The file to write; None if no picture was asked for.

    Raises:
        UserError: If matplotlib is missing, or cannot write the format that
            the path ends in.
    """
    if path is None:
        return
    require_packages('a plot', 'demo', 'matplotlib')
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise UserError(
            f'cannot draw {path}: the name of a picture must end in one of '
            f'{", ".join(f".{name}" for name in sorted(formats))}'
        )
