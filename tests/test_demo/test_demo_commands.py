# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The three tasks end to end: some iterations through tools/, as commands.

Real runner, data sets and evaluators; each task is trained once a session.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdbb.demo.layouts import LAYOUTS
from mmdbb.demo.run import TASKS

HOME = Path(__file__).resolve().parents[2]
# A handful of iterations, small batches, and no processes for the loading.
SHORT = dict(
    classification=['train_cfg.max_epochs=1', 'train_cfg.val_interval=1'],
    detection=['train_cfg.max_epochs=1', 'train_cfg.val_interval=1'],
    segmentation=['train_cfg.max_iters=3', 'train_cfg.val_interval=3'],
)
CHECKPOINT = dict(
    classification='default_hooks.checkpoint.interval=1',
    detection='default_hooks.checkpoint.interval=1',
    segmentation='default_hooks.checkpoint.interval=3',
)
HOST = dict(
    classification='mmpretrain', detection='mmdet', segmentation='mmseg'
)


def command(tool, *args):
    env = dict(os.environ, OMP_WAIT_POLICY='PASSIVE')
    return subprocess.run(
        [sys.executable, '-W', 'ignore', HOME / 'tools' / tool]
        + [str(arg) for arg in args],
        env=env,
        capture_output=True,
        text=True,
    )


def succeeded(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def metrics(folder):
    """What tools/test.py logged last under a work folder."""
    return json.loads(max(folder.glob('*/*.json')).read_text())


@pytest.fixture(scope='module', params=list(TASKS))
def trained(request, tiny_data, tmp_path_factory):
    """A task, its config, options, work folder and trained checkpoint."""
    task = request.param
    pytest.importorskip(HOST[task])
    config = HOME / 'configs' / 'demo' / TASKS[task].config
    folder = tiny_data / LAYOUTS[task].name
    work = tmp_path_factory.mktemp(task)
    options = ['--cfg-options', *SHORT[task], CHECKPOINT[task]]
    for split in ('train', 'val', 'test'):
        loader = f'{split}_dataloader'
        options += [
            f'{loader}.dataset.data_root={folder}/',
            f'{loader}.num_workers=0',
            f'{loader}.persistent_workers=False',
            f'{loader}.batch_size=4',
        ]
    if task == 'detection':
        annotations = folder / 'annotations' / 'instances_val2017.json'
        options += [
            f'{part}_evaluator.ann_file={annotations}'
            for part in ('val', 'test')
        ]
    succeeded(command('train.py', config, '--work-dir', work, *options))
    checkpoint = (work / 'last_checkpoint').read_text().strip()
    return task, config, options, work, checkpoint


def test_trained_and_merged_networks_score_the_same(trained):
    task, config, options, work, checkpoint = trained
    metric = TASKS[task].metric
    before = work / 'before'
    succeeded(
        command('test.py', config, checkpoint, '--work-dir', before, *options)
    )
    out = work / 'stock.pth'
    said = succeeded(command('reparam.py', config, checkpoint, out, *options))
    assert 'largest difference' in said
    after = work / 'after'
    succeeded(
        command('test.py', out.with_suffix('.py'), out, '--work-dir', after)
    )
    assert metric in metrics(before)
    assert metrics(after)[metric] == pytest.approx(
        metrics(before)[metric], abs=TASKS[task].tolerance
    )


def test_merged_config_is_of_the_stock_network(trained):
    task, config, options, work, checkpoint = trained
    out = work / 'again.pth'
    succeeded(command('reparam.py', config, checkpoint, out, *options))
    text = out.with_suffix('.py').read_text()
    assert 'mmdbb' not in text
    assert 'DBB' not in text
    assert "type='mmpretrain.ResNet'" in text
