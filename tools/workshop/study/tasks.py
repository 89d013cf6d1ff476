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
from typing import Dict, Iterator, NamedTuple, Sequence, Tuple

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner, set_random_seed

from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks
from workshop.demo.prepare import prepare
from workshop.demo.run import TASKS
from workshop.study.networks import check_names, take_dense_kernels_
from workshop.study.plan import SEARCH_SEED, Cell, Schedule, beyond
from workshop.study.rows import (
    Record,
    Row,
    Training,
    read_record,
    rounded,
    write_record,
)
from workshop.study.variants import BLOCKS, PLAIN, Part


class Task(NamedTuple):
    """One of the demo's.

    Attributes:
        name: Its name there.
        figure: What its evaluator measures.
        unit: The evaluator's unit in per cent.
    """

    name: str
    figure: str
    unit: float


#: Name in tables -> the demo's task.
NETWORKS = {
    'ATSS': Task('detection', 'box mAP', 100.0),
    'Semantic FPN': Task('segmentation', 'mIoU', 1.0),
}
#: The demo's learning rate is multiplied by one of these. A search begins with
#: three, and goes on as long as the best is at an end.
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
FIRST_FACTORS = (0.3, 1.0, 3.0)
#: What is drawn anew for searches.
SEARCH_DATA = 1
_MACHINE = 'CPU, one thread, float32'
_WIDTH = 16


class TaskPlan(NamedTuple):
    """What to run.

    Attributes:
        home: The folder that holds ``configs``.
        data_root: The folder that has or gets the data sets.
        networks: Some of :data:`NETWORKS`.
        part: What is compared.
        seeds: Trainings of each block that are compared.
        images: To train and to validate on; None for the demo's numbers.
    """

    home: Path
    data_root: str
    networks: Sequence[str]
    part: Part
    seeds: int = 5
    images: Sequence = (None, None)


def cell_of(network: str, cfg: Config) -> Cell:
    """The cell of a task's rows; the demo's whole data set has size 0."""
    length = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    schedule = Schedule(cfg.train_dataloader.batch_size, length)
    return Cell(network, _WIDTH, 0, schedule, _MACHINE)


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
        for training in _trainings(plan, network, record):
            if record.find(training) is None:
                if time.monotonic() > stop:
                    return
                row = Row(training, *_run(plan, training))
                record.rows.append(row)
                write_record(out, record)
                yield row


def _trainings(
    plan: TaskPlan, network: str, record: Record
) -> Iterator[Training]:
    """All that a network needs, in order; later ones depend on earlier."""
    cfg = base_config(plan.home, network)
    cell = cell_of(network, cfg)
    rate = cfg.optim_wrapper.optimizer.lr
    epochs = cell.schedule.epochs
    found = {}
    for block in plan.part.blocks:
        tried: Dict[float, Training] = {}
        factors = [*FIRST_FACTORS]
        while factors:
            for factor in factors:
                lr = round(factor * rate, 6)
                tried[factor] = cell.training(
                    block, SEARCH_SEED, 'search', lr, epochs
                )
                yield tried[factor]
            best = max(tried, key=lambda f: record.find(tried[f]).top1)
            further = beyond(best, [*tried], FACTORS)
            factors = [] if further is None else [further]
        found[block] = tried[best]
    for seed in range(plan.seeds):
        for training in found.values():
            yield training._replace(seed=seed, role='test')


def base_config(home: Path, network: str) -> Config:
    """The demo's config of a task."""
    name = TASKS[NETWORKS[network].name].config
    return Config.fromfile(Path(home, 'configs', 'demo', name))


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
    cfg.default_hooks.checkpoint.update(interval=-1)
    cfg.randomness = dict(seed=training.seed)
    cfg.log_level = 'WARNING'
    name = f'{training.network}_{training.block}_{training.seed}'
    cfg.experiment_name = f'{name}_{training.lr}_{os.getpid()}'
    # By a name of the config's, all runs would share the first one's folder.
    cfg.visualizer.name = cfg.experiment_name
    return cfg


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


#: What the detector and the segmentor are compared with.
PART = Part((PLAIN, 'DBB', 'OREPA'))
