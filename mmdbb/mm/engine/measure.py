# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What tools measure and report: latency in turns, tables, files."""

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


@contextlib.contextmanager
def report_files(
    *paths: Optional[str], overwrite: bool = False
) -> Iterator[List[Optional[str]]]:
    """`all_or_nothing` for files of which some were not asked for.

    Args:
        paths: The files to write, None for one that is not.
        overwrite: Whether existing files may be replaced.

    Yields:
        list: A temporary path for each file, None for None.

    Raises:
        UserError: As of :func:`~mmdbb.files.atomic.all_or_nothing`,
            before any work.
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
        path: The file to write; None for none.

    Raises:
        UserError: If matplotlib is missing, or does not know the format.
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
