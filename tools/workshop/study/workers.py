# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Processes that train, each a network at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    wait,
)
from multiprocessing import active_children, get_context
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch

from workshop.study.rows import Row, Training


class Workers:
    """Processes that train; with one job, this process does.

    Args:
        run: Trains a network, given the training and what else it needs;
            gives the rows that it found.
        jobs: How many.
    """

    def __init__(self, run: Callable[..., List[Row]], jobs: int) -> None:
        self.run, self.jobs = run, jobs
        self.running: Dict[Future, Training] = {}
        self.pool = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Optional[type], *error) -> None:
        if self.pool is not None:
            if kind is not None:  # stop at once, as one process would
                for worker in active_children():
                    worker.terminate()
            self.pool.shutdown(cancel_futures=True)

    @property
    def are_busy(self) -> bool:
        """Whether each has something to do."""
        return len(self.running) >= self.jobs

    def start(self, training: Training, *needs: Any) -> None:
        """Start a training, unless it runs already.

        Args:
            training: The training.
            needs: What ``run`` gets besides.
        """
        if training in self.running.values():
            return
        if self.jobs > 1 and self.pool is None:
            # One process imports, and is forked before it computes anything.
            context = get_context('forkserver')
            context.set_forkserver_preload(['workshop.study.run'])
            self.pool = ProcessPoolExecutor(self.jobs, context, _prepare)
        if self.pool is None:
            future = Future()
            future.set_result(self.run(training, *needs))
        else:
            with _imports_found():
                future = self.pool.submit(self.run, training, *needs)
        self.running[future] = training

    def wait(self) -> Iterator[Row]:
        """Wait until a training is done."""
        done, _ = wait(self.running, return_when=FIRST_COMPLETED)
        for future in done:
            del self.running[future]
            yield from future.result()


@contextlib.contextmanager
def _imports_found() -> Iterator[None]:
    """Let processes that start within the context import what this one can.

    Before Python 3.12 the server that forks them knows no other way.
    """
    before = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join(sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ['PYTHONPATH']
        else:
            os.environ['PYTHONPATH'] = before


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
