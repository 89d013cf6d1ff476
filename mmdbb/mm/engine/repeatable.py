# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Random numbers that a resumed training draws as the uninterrupted one.

What is drawn in a step follows from the seed and the step, not from what was
drawn before it: validation, saving or a restart change nothing. So nothing
needs to be kept in a checkpoint but the counts that are in it.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

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

    On the CPU, and on GPUs with ``randomness.deterministic``, with as many
    processes and workers. An iteration-based training draws its images again
    while mmengine skips those that were seen; it needs at least one worker.

    Raises:
        UserError: If the config has no ``randomness.seed``.

    Examples:
        >>> HOOKS.build(dict(type='RepeatableHook')).priority
        'VERY_HIGH'
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot be repeated."""
        if runner.cfg.get('randomness', {}).get('seed') is None:
            raise UserError(
                'a training is repeatable only from a seed; set one by '
                '--cfg-options randomness.seed=0'
            )

    def before_train(self, runner: Runner) -> None:
        """Let images be drawn by the epoch and their index."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            loader = runner.train_dataloader
            seeded = SeededDataset(loader.dataset, runner.seed)
            give_dataset(loader, seeded)

    def before_train_epoch(self, runner: Runner) -> None:
        """Let the workers know the epoch."""
        dataset = runner.train_dataloader.dataset
        if isinstance(dataset, SeededDataset):
            dataset.epoch.fill_(runner.epoch)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Draw anew from here."""
        _seed(runner.seed, get_rank(), runner.iter)


class SeededDataset(Dataset):
    """A data set whose images follow from seed, epoch and index.

    Args:
        dataset: The data set.
        seed: Of the training.

    Attributes:
        epoch: Shared with the workers, which outlive an epoch.
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
        # In the training's own process that follows from the seed as well.
        worker = get_worker_info()
        place = get_rank(), 0 if worker is None else worker.id + 1
        _seed(self._seed, *place, epoch, int(index), self._drawn[index])
        return self._dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == '_dataset':
            raise AttributeError(name)
        return getattr(self._dataset, name)


def _seed(*numbers: int) -> None:
    """Seed all generators of this process by some numbers."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))
