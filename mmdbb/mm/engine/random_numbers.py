# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Leave the random numbers of a training alone."""

from __future__ import annotations

import contextlib
import random
from typing import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch on exit."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count() * torch.cuda.is_initialized())
    try:
        with torch.random.fork_rng(devices=list(gpus)):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
