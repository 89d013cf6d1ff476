# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A resumed training draws the random numbers of an uninterrupted one.

All generators are seeded anew in each step, by the seed and the number of the
step. So it does not matter what was drawn before: validation, saving or a
restart change nothing. A checkpoint need not hold the generators' states; the
epoch and the iteration, which it holds anyway, are enough.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from typing import Any, Iterator

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import Dataset, get_worker_info

from mmdbb.errors import UserError
from mmdbb.mm.host_internals import give_dataset


@HOOKS.register_module()
class RepeatableHook(Hook):
    """Makes a resumed training equal to the uninterrupted one, bit by bit.

    This holds on the CPU, and on GPUs with ``randomness.deterministic``. The
    numbers of processes and of workers must stay the same. When an
    iteration-based training is resumed, mmengine loads all images that were
    seen before once more and skips them, so that the later ones come out the
    same; it needs at least one worker.

    Raises:
        UserError: If the config has no ``randomness.seed``.

    Examples:
        >>> HOOKS.build(dict(type='RepeatableHook')).priority
        'VERY_HIGH'
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Raise if the config has no seed."""
        if runner.cfg.get('randomness', {}).get('seed') is None:
            raise UserError(
                'a training is repeatable only from a seed; set one by '
                '--cfg-options randomness.seed=0'
            )

    def before_train(self, runner: Runner) -> None:
        """Let the augmentation of an image follow from epoch and index."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            loader = runner.train_dataloader
            seeded = SeededDataset(loader.dataset, runner.seed)
            give_dataset(loader, seeded)

    def before_train_epoch(self, runner: Runner) -> None:
        """Tell the workers the number of the epoch."""
        dataset = runner.train_dataloader.dataset
        if isinstance(dataset, SeededDataset):
            dataset.epoch.fill_(runner.epoch)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Seed all generators by the number of the iteration."""
        _seed(runner.seed, get_rank(), runner.iter)


class SeededDataset(Dataset):
    """A data set whose random augmentation follows from seed, epoch and index.

    Args:
        dataset: The data set to wrap.
        seed: Seed of the training.

    Attributes:
        epoch: Number of the epoch, in a tensor of shape (1,). It lies in
            shared memory, because workers go on from one epoch to the next.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._drawn: Counter = Counter()
        self._drawn_in = -1

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        epoch = int(self.epoch)
        if epoch != self._drawn_in:
            self._drawn.clear()
            self._drawn_in = epoch
        self._drawn[index] += 1
        # Number 0 stands for the training process itself, which loads the
        # images if there are no workers.
        worker = get_worker_info()
        place = get_rank(), 0 if worker is None else worker.id + 1
        _seed(self._seed, *place, epoch, int(index), self._drawn[index])
        return self._dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == '_dataset':
            raise AttributeError(name)
        return getattr(self._dataset, name)


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


def _seed(*numbers: int) -> None:
    """Seed Python, NumPy and torch in this process by some numbers."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))
