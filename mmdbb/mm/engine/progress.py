# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a command's log to one line that says how far it is."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from typing import Callable, Iterator, Optional

# 'Epoch(train) [3][20/63]', 'Iter(train) [ 90/600]', 'Epoch(val) [2][5/10]'
WHERE = re.compile(
    r'(?:Epoch|Iter)\((train|val|test)\)\s*(?:\[\s*(\d+)\])?'
    r'\[\s*(\d+)/(\d+)\]'
)
SHOWN = ('eta', 'loss', 'accuracy/top1', 'coco/bbox_mAP', 'mIoU')
# 'mmengine - ERROR - .../coco_metric.py - compute_metrics - 463 - No box.'
ERROR = re.compile(r' - (?:ERROR|CRITICAL) - (?:.* - )?(\S.*)$')
MERGED = re.compile(r'^(merged \d+ blocks|largest difference)')


class Progress:
    """Shows the latest line of interest: in place on a terminal.

    Elsewhere a line appears every ``every`` seconds, and each line of
    results.
    """

    def __init__(self, every: float = 15.0):
        self.every = every
        self.out = sys.stdout  # which may be redirected later
        self.terminal = self.out.isatty()
        self.shown_at = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *args) -> None:
        if self.terminal:
            self._write('\r\033[K', end='')

    def read(self, line: str) -> None:
        """Take one line of the log."""
        if MERGED.match(line):
            self._keep(line.strip())
            return
        error = ERROR.search(line)
        if error:
            self._keep(error[1])
            return
        text = summary(line)
        if text is None:
            return
        if any(f' {name} ' in text for name in SHOWN[2:]):
            self._keep(text)
        elif self.terminal:
            self._write(f'\r\033[K  {text}', end='')
        elif time.monotonic() - self.shown_at >= self.every:
            self._keep(text)

    def _keep(self, text: str) -> None:
        start = '\r\033[K' if self.terminal else ''
        self._write(f'{start}  {text}')
        self.shown_at = time.monotonic()

    def _write(self, text: str, end: str = '\n') -> None:
        print(text, end=end, file=self.out, flush=True)


@contextlib.contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Within the context only progress is printed, not mmengine's log.

    What a runner that is built in the context would print is read line by
    line, and shown by :class:`Progress`. Its log file is written as always.

    Args:
        quiet: False to change nothing.
    """
    if not quiet:
        yield
        return
    with Progress() as progress:
        lines = _Lines(progress.read)
        with contextlib.redirect_stdout(lines):
            try:
                yield
            finally:
                lines.read = lambda line: None  # loggers keep the stream


class _Lines(io.TextIOBase):
    """A stream that passes on each whole line.

    Args:
        read: Takes a line.
    """

    def __init__(self, read: Callable[[str], None]) -> None:
        self.read = read
        self._begun = ''

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split('\n')
        for line in whole:
            self.read(line)
        return len(text)


def summary(line: str) -> Optional[str]:
    """What an mmengine log line says of interest, or None.

    >>> summary('INFO - Epoch(train) [2][20/63]  lr: 1.0  eta: 0:00:24  '
    ...         'time: 0.06  loss: 0.72')
    'epoch 2  20/63  eta 0:00:24  loss 0.72'
    """
    where = WHERE.search(line)
    if where is None:
        return None
    mode, epoch, step, steps = where.groups()
    parts = [mode] if mode != 'train' else []
    parts += [f'epoch {epoch}'] if epoch and mode == 'train' else []
    parts += [f'{step}/{steps}']
    for name in SHOWN:
        value = re.search(rf'(?<!\S){re.escape(name)}: (\S+)', line)
        if value:
            parts.append(f'{name} {value.group(1)}')
    return '  '.join(parts)
