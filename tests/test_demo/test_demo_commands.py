# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The three demos from data to picture, at a handful of iterations.

Each stage is a command in tools/ that runs in a process of its own, with the
real runner, data set and evaluator.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from workshop.demo.run import LOG, TASKS, run_demo

HOME = Path(__file__).resolve().parents[2]
ONCE = [
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'default_hooks.checkpoint.interval=1',
]
SHORT = dict(
    classification=ONCE,
    # After two iterations no score is high.
    detection=[*ONCE, 'model.test_cfg.score_thr=0.001'],
    segmentation=[
        'train_cfg.max_iters=3',
        'train_cfg.val_interval=3',
        'default_hooks.checkpoint.interval=3',
    ],
)
# No processes for the loading, and batches that some images fill.
LOADERS = [
    f'{split}_dataloader.{setting}'
    for split in ('train', 'val', 'test')
    for setting in (
        'num_workers=0',
        'persistent_workers=False',
        'batch_size=4',
    )
]
HOST = dict(
    classification='mmpretrain', detection='mmdet', segmentation='mmseg'
)


def logged(folder):
    """What tools/test.py logged last under a work folder."""
    return json.loads(max(folder.glob('*/*.json')).read_text())


def fused_figure(work, spec):
    """What tools/test.py finds for the network with its norms folded too."""
    trained = (work / 'last_checkpoint').read_text().strip()
    fused = work / 'fused.pth'
    options = ['--cfg-options', *LOADERS]
    for tool, *arguments in (
        ['reparam.py', HOME / 'configs/demo' / spec.config, trained, fused]
        + ['--fuse', '--image-size', '32', '32'],
        ['test.py', work / 'deploy.py', fused]
        + ['--work-dir', work / 'test_fused', *options],
    ):
        command = [sys.executable, '-W', 'ignore', HOME / 'tools' / tool]
        subprocess.run([*command, *arguments], check=True, cwd=work)
    return logged(work / 'test_fused')[spec.metric]


@pytest.mark.parametrize('task', list(TASKS))
def test_trained_merged_and_tested_as_commands(
    task, tiny_data, tiny_images, tmp_path, capfd
):
    pytest.importorskip(HOST[task])
    pytest.importorskip('rich')
    pytest.importorskip('matplotlib')
    work = tmp_path / 'work'
    spec = TASKS[task]
    found = run_demo(
        task,
        HOME,
        str(work),
        str(tiny_data),
        images=tiny_images[task],
        options=[*SHORT[task], *LOADERS],
    )
    said = capfd.readouterr().out

    commands = [
        Path(line.split()[2]).name
        for line in (work / LOG).read_text().splitlines()
        if line.startswith('$ ')
    ]
    assert commands == ['train.py', 'test.py', 'reparam.py', 'test.py']
    # The evaluators' own figures, of the two networks.
    for name in ('trained', 'deployed'):
        assert logged(work / f'test_{name}')[spec.metric] == found[name]
    assert found['deployed'] == pytest.approx(
        found['trained'], abs=spec.tolerance
    )
    # The second network is the stock one, and knows nothing of mmdbb.
    config = (work / 'deploy.py').read_text()
    assert 'mmdbb' not in config and 'DBB' not in config
    assert "type='mmpretrain.ResNet'" in config
    if task == 'classification':
        assert fused_figure(work, spec) == pytest.approx(
            found['trained'], abs=spec.tolerance
        )
    for text in (
        'parameters',
        spec.title,
        'latency of',
        'largest output difference',
        str(work / 'predictions.png'),
        'to try next',
    ):
        assert text in said
    picture = (work / 'predictions.png').read_bytes()
    assert picture.startswith(b'\x89PNG') and len(picture) > 10_000


def test_mistake_of_the_user_takes_one_line(tmp_path):
    (tmp_path / 'mine.txt').touch()
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', HOME / 'tools' / 'demo.py']
        + ['--work-dir', str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert 'choose another --work-dir' in done.stderr
