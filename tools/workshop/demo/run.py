# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The demo's stages: data, training, test, merging, test again, report.

Every stage but the first and the last is one of the project's commands, run
as a user would run it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from mmengine.config import Config

from mmdbb.errors import require_packages
from mmdbb.mm.engine.progress import Progress
from workshop.demo.layouts import LAYOUTS
from workshop.demo.prepare import prepare
from workshop.demo.started import LOG, claim, goes_on

#: The checkpoints of mmengine's trainings.
CHECKPOINTS = '*_[0-9]*.pth'  # epoch_3.pth, iter_300.pth


@dataclass(frozen=True)
class Task:
    """A demo.

    Attributes:
        config: The config's file, in ``configs/demo``.
        metric: The evaluator's name for the figure to report.
        title: What people call it.
        tolerance: How far the two networks' figures may be apart: nothing,
            or one unit of the last digit that the evaluator rounds to.
        batch: Images in the batch that latency is measured on.
        next_step: What to try after it.
    """

    config: str
    metric: str
    title: str
    tolerance: float
    batch: int
    next_step: str


TASKS = dict(
    classification=Task(
        'resnet18_dbb_mnist5k.py',
        'accuracy/top1',
        'top-1 (%)',
        0.0,
        64,
        'make demo TASK=detection',
    ),
    detection=Task(
        'resnet18_dbb_digits_coco.py',
        'coco/bbox_mAP',
        'box mAP',
        0.0011,
        8,
        'make demo TASK=segmentation',
    ),
    segmentation=Task(
        'resnet18_dbb_digits_cityscapes.py',
        'mIoU',
        'mIoU (%)',
        0.011,
        8,
        "conv_cfg=dict(type='DBB') in a config of your own",
    ),
)


def run_demo(
    task: str,
    home: Path,
    work_dir: Optional[str] = None,
    data_root: str = 'data',
    seed: int = 0,
    images: Sequence[Optional[int]] = (None, None),
    options: Sequence[str] = (),
) -> Dict[str, float]:
    """Run a demo from data to picture, and print what comes of it.

    Args:
        task: Name of one of ``TASKS``.
        home: The folder that holds ``configs`` and ``tools``.
        work_dir: For everything the demo writes but the data.
        data_root: The folder that has or gets the data set.
        seed: Of the training. The data set is the same for every seed.
        images: To train and to validate on, if not the usual numbers.
        options: More ``--cfg-options`` for the training.

    Returns:
        The figure that the task reports, before (``'trained'``) and after
        merging (``'deployed'``).

    Raises:
        UserError: Something that the user can put right.
        SystemExit: A stage failed, or the two networks differ.
    """
    from workshop.demo.report import report

    require_packages('the demo', 'demo', 'rich', 'matplotlib')
    spec = TASKS[task]
    work = claim(Path(work_dir or f'work_dirs/demo_{task}'))
    config = home / 'configs' / 'demo' / spec.config
    stages = _Stages(home / 'tools', work)

    stages.announce(f'data        {Path(data_root) / LAYOUTS[task].name}')
    folder = prepare(task, data_root, 0, *images)
    cfg_options = _cfg_options(config, folder, seed, options)
    changes = ['--cfg-options', *cfg_options] if cfg_options else []
    trained = Config.fromfile(config)
    trained.merge_from_dict(_parsed(cfg_options))

    what = dict(config=trained.pretty_text, images=list(images))
    resume = ['--resume'] if goes_on(work, what, CHECKPOINTS) else []
    stages.announce(f'training    {spec.config}{_on_from(work, resume)}')
    stages.run('train.py', config, '--work-dir', work, *resume, *changes)
    checkpoint = (work / 'last_checkpoint').read_text().strip()

    stages.announce(f'test        {checkpoint}')
    found = {}
    found['trained'] = stages.test(
        config, checkpoint, work / 'test_trained', spec.metric, changes
    )
    stages.announce(f'merging     {work / "deploy.pth"}')
    stages.run(
        'reparam.py',
        config,
        checkpoint,
        work / 'deploy.pth',
        '--force',
        *changes,
    )
    stages.announce(f'test        {work / "deploy.pth"}')
    found['deployed'] = stages.test(
        work / 'deploy.py',
        work / 'deploy.pth',
        work / 'test_deployed',
        spec.metric,
        [],
    )
    apart = abs(found['trained'] - found['deployed'])
    if not apart <= spec.tolerance:
        raise SystemExit(
            f'the merged network gives another {spec.title}: '
            f'{found["deployed"]} instead of {found["trained"]}'
        )
    stages.announce('comparison  outputs, latency, picture')
    report(task, spec, trained, checkpoint, work, found)
    print(f'trained network:  {config} {checkpoint}')
    print(f'merged network:   {work / "deploy.py"} {work / "deploy.pth"}')
    print(f'predictions:      {work / "predictions.png"}')
    print(f'everything said:  {work / LOG}')
    print(f'to try next:      {spec.next_step}')
    return found


class _Stages:
    """Runs the commands in ``tools``, with their output in the log."""

    def __init__(self, tools: Path, work: Path):
        self.tools = tools
        self.log = work / LOG

    def announce(self, line: str) -> None:
        print(line, flush=True)

    def run(self, tool: str, *args) -> None:
        """Run one command, and exit with its last lines if it fails."""
        command = [sys.executable, self.tools / tool, *args]
        command = [str(part) for part in command]
        env = dict(os.environ, PYTHONUNBUFFERED='1')
        # These networks are so small that a second thread costs more than it
        # brings, and threads that spin while they wait, on a busy machine,
        # cost most of the time.
        env.setdefault('OMP_NUM_THREADS', '1')
        env.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
        last = deque(maxlen=15)
        with open(self.log, 'a') as log, Progress() as progress:
            log.write(f'$ {" ".join(command)}\n')
            process = subprocess.Popen(
                command,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors='replace',
            )
            try:
                for line in process.stdout:
                    log.write(line)
                    last.append(line)
                    progress.read(line)
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if code:
            print(''.join(last), end='', file=sys.stderr)
            print(
                f'{tool} failed; its output is in {self.log}', file=sys.stderr
            )
            raise SystemExit(1)

    def test(self, config, checkpoint, folder, metric, changes) -> float:
        """Run tools/test.py and return the metric it logged."""
        self.run('test.py', config, checkpoint, '--work-dir', folder, *changes)
        # mmengine names a run's folder and its JSON after the time.
        newest = max(folder.glob('*/*.json'))
        found = json.loads(newest.read_text())
        if metric not in found:  # CocoMetric, when nothing was detected
            raise SystemExit(
                f'tools/test.py found no {metric}: the network predicts '
                f'nothing; its output is in {self.log}'
            )
        return found[metric]


def _on_from(work: Path, resume: Sequence[str]) -> str:
    """What to say of an earlier call."""
    if not resume:
        return ''
    newest = max(work.glob(CHECKPOINTS), key=lambda p: p.stat().st_mtime)
    return f', on from {newest.name} (to start anew, remove {work})'


def _cfg_options(
    config: Path, folder: Path, seed: int, options: Sequence[str]
) -> List[str]:
    """What the demo changes in its config: nothing, when run as it is."""
    cfg = Config.fromfile(config)
    changes = {}
    if cfg.randomness.seed != seed:
        changes['randomness.seed'] = seed
    root = Path(cfg.train_dataloader.dataset.data_root)
    if folder != root:
        for part in ('train', 'val', 'test'):
            changes[f'{part}_dataloader.dataset.data_root'] = f'{folder}/'
        for part in ('val_evaluator', 'test_evaluator'):
            if 'ann_file' in cfg[part]:
                inside = Path(cfg[part].ann_file).relative_to(root)
                changes[f'{part}.ann_file'] = folder / inside
    return [f'{key}={value}' for key, value in changes.items()] + [*options]


def _parsed(options: Sequence[str]) -> Dict[str, object]:
    from mmdbb.mm.engine.command import parsed_options

    return parsed_options(options)
