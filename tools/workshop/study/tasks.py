# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The demo's detector and segmentor with each block: box mAP and mIoU.

mmengine's Runner trains them by the demo's configs. Each block gets the same
search of the learning rate, on a data set that was drawn anew for it, and
starts from the plain network's kernels.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Iterator, Tuple

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner, set_random_seed

from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks
from workshop.demo.prepare import prepare
from workshop.demo.run import TASKS
from workshop.study.networks import check_names, take_dense_kernels_
from workshop.study.rows import (
    Record,
    Row,
    Training,
    read_record,
    rounded,
    write_record,
)
from workshop.study.task_plan import (
    NETWORKS,
    TaskPlan,
    base_config,
    length_key,
    trainings,
)
from workshop.study.variants import BLOCKS, PLAIN

#: What is drawn anew for searches.
SEARCH_DATA = 1


def run_tasks(
    plan: TaskPlan, out: Path, minutes: float = float('inf')
) -> Iterator[Row]:
    """Run what is missing in a file; a run that was cut goes on from it.

    Args:
        plan: What to run.
        out: JSON with the results.
        minutes: When to stop; the training in progress is finished.

    Yields:
        Row: Each training that this call made; its accuracy is box mAP or
        mIoU in per cent.

    Raises:
        UserError: If ``out`` holds something else or cannot be written, or a
            name is unknown.
    """
    check_names(blocks=plan.part.blocks)
    unknown = sorted(set(plan.networks) - set(NETWORKS))
    if unknown:
        raise UserError(f'unknown networks {unknown}; allowed: {[*NETWORKS]}')
    record = read_record(out) if out.exists() else Record([], [])
    write_record(out, record)
    stop = time.monotonic() + 60 * minutes
    for network in plan.networks:
        for training in trainings(plan, network, record):
            if record.find(training) is None:
                if time.monotonic() > stop:
                    return
                row = Row(training, *_run(plan, training))
                record.rows.append(row)
                write_record(out, record)
                yield row


def task_config(plan: TaskPlan, training: Training) -> Config:
    """The demo's config with another block, rate and seed, and one start."""
    cfg = base_config(plan.home, training.network)
    task = NETWORKS[training.network].name
    searching = training.role == 'search'
    root = Path(plan.data_root, 'search') if searching else plan.data_root
    folder = prepare(task, root, SEARCH_DATA * searching, *plan.images)
    inside = Path(cfg.data_root)
    for part in ('train', 'val'):
        loader = cfg[f'{part}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{folder}/'
    if 'ann_file' in cfg.val_evaluator:
        file = Path(cfg.val_evaluator.ann_file).relative_to(inside)
        cfg.val_evaluator.ann_file = str(folder / file)
    for part in ('dataloader', 'cfg', 'evaluator'):
        cfg.pop(f'test_{part}')
    cfg.model.backbone.update(
        block=dict(BLOCKS[training.block].config),
        init_cfg=dict(type='TorchDefault'),
    )
    cfg.optim_wrapper.optimizer.lr = training.lr
    _set_length_(cfg, training.epochs)
    cfg.default_hooks.checkpoint.update(interval=-1)
    cfg.randomness = dict(seed=training.seed)
    cfg.log_level = 'WARNING'
    # By a name of the config's, all runs would share the first one's folder.
    name = '_'.join(map(str, training))
    cfg.experiment_name = f'{name}_{os.getpid()}'
    cfg.visualizer.name = cfg.experiment_name
    return cfg


def _set_length_(cfg: Config, length: int) -> None:
    """Train for as long as given, with a schedule of the same shape."""
    loop = cfg.train_cfg
    share = length / loop[length_key(loop)]
    loop.update({length_key(loop): length, 'val_interval': length})
    for schedule in cfg.param_scheduler:
        for bound in {'begin', 'end', 'T_max'} & {*schedule}:
            schedule[bound] = round(share * schedule[bound])


class OneStart(Hook):
    """Gives a network the start of the plain network of a seed.

    What lies outside blocks takes the plain network's weights, and of a block
    what :func:`~workshop.study.networks.take_dense_kernels_` says. The plain
    network's norms behind blocks have no counterpart, and start as norms do.
    Random numbers begin anew after it.

    Args:
        plain: Config of the plain network.
        seed: Of its weights.
    """

    def __init__(self, plain: dict, seed: int) -> None:
        self.plain, self.seed = plain, seed

    def before_train(self, runner: Runner) -> None:
        """Take the weights."""
        set_random_seed(self.seed)
        plain = MODELS.build(self.plain)
        plain.init_weights()
        blocks, state = find_blocks(runner.model), runner.model.state_dict()
        for name, value in plain.state_dict().items():
            if name.rpartition('.')[0] not in blocks and name in state:
                state[name].copy_(value)
        take_dense_kernels_(runner.model, plain)
        set_random_seed(self.seed)


def start_of(cfg: Config) -> OneStart:
    """The hook for a config of :func:`task_config`."""
    plain = copy.deepcopy(cfg.model)
    plain.backbone.block = dict(BLOCKS[PLAIN].config)
    return OneStart(plain, cfg.randomness.seed)


def _run(plan: TaskPlan, training: Training) -> Tuple[float, float]:
    cfg = task_config(plan, training)
    task = NETWORKS[training.network]
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        runner = Runner.from_cfg(cfg)
        runner.register_hook(start_of(cfg), priority='HIGHEST')
        begin = time.process_time()
        runner.train()
        seconds = time.process_time() - begin
        scalars = runner.message_hub.log_scalars
        name = f'val/{TASKS[task.name].metric}'
        # A detector that finds nothing at all gets no figure.
        value = scalars[name].current() if name in scalars else 0.0
    return rounded(task.unit * value, seconds)
