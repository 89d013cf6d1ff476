# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a command's log to one line that says how far it is."""

from __future__ import annotations

import re
import sys
import time
from typing import Optional

# 'Epoch(train) [3][20/63]', 'Iter(train) [ 90/600]', 'Epoch(val) [2][5/10]'
WHERE = re.compile(
    r'(?:Epoch|Iter)\((train|val|test)\)\s*(?:\[\s*(\d+)\])?'
    r'\[\s*(\d+)/(\d+)\]'
)
SHOWN = ('eta', 'loss', 'accuracy/top1', 'coco/bbox_mAP', 'mIoU')
MERGED = re.compile(r'^(merged \d+ blocks|largest difference)')


class Progress:
    """Shows the latest line of interest: in place on a terminal.

    Elsewhere a line appears every ``every`` seconds, and each line of
    results.
    """

    def __init__(self, every: float = 15.0):
        self.every = every
        self.terminal = sys.stdout.isatty()
        self.shown_at = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *args) -> None:
        if self.terminal:
            print('\r\033[K', end='', flush=True)

    def read(self, line: str) -> None:
        """Take one line of the log."""
        if MERGED.match(line):
            self._keep(line.strip())
            return
        text = summary(line)
        if text is None:
            return
        if any(f' {name} ' in text for name in SHOWN[2:]):
            self._keep(text)
        elif self.terminal:
            print(f'\r\033[K  {text}', end='', flush=True)
        elif time.monotonic() - self.shown_at >= self.every:
            self._keep(text)

    def _keep(self, text: str) -> None:
        start = '\r\033[K' if self.terminal else ''
        print(f'{start}  {text}', flush=True)
        self.shown_at = time.monotonic()


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
