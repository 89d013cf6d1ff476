# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The demo itself: its stages, what it prints, and how it fails."""

from pathlib import Path

import pytest
from workshop.demo import run

from mmdbb.errors import UserError
from mmdbb.mm.engine.measure import interleaved_latency
from mmdbb.mm.engine.progress import Progress, summary

HOME = Path(__file__).resolve().parents[2]


def test_networks_that_differ_stop_the_demo(tiny_data, tmp_path, monkeypatch):
    """And the next call goes on, but where something else is trained."""
    trainings = []

    def run_stage(stages, tool, *args):
        if tool == 'train.py':
            trainings.append('--resume' in args)
            (tmp_path / 'epoch_1.pth').touch()
            (tmp_path / 'last_checkpoint').write_text('epoch_1.pth')

    def figure(stages, config, checkpoint, folder, *args):
        return 97.0 if 'trained' in folder.name else 96.0

    monkeypatch.setattr(run._Stages, 'run', run_stage)
    monkeypatch.setattr(run._Stages, 'test', figure)
    for seed in (0, 0, 1):
        with pytest.raises(SystemExit, match='96.0 instead of 97.0'):
            run.run_demo(
                'classification', HOME, tmp_path, tiny_data, seed, (40, 20)
            )
    assert trainings == [False, True, False]


def test_failed_stage_shows_its_last_lines(tmp_path, capfd):
    (tmp_path / 'train.py').write_text(
        "print('early')\n" * 20 + "raise SystemExit('no such thing')\n"
    )
    stages = run._Stages(tmp_path, tmp_path)
    with pytest.raises(SystemExit) as stopped:
        stages.run('train.py')
    assert stopped.value.code == 1
    said = capfd.readouterr().err
    assert 'no such thing' in said
    assert str(tmp_path / run.LOG) in said
    assert said.count('early') < 20
    assert (tmp_path / run.LOG).read_text().count('early') == 20


def test_folder_of_others_is_not_used(tmp_path):
    (tmp_path / 'mine.txt').touch()
    with pytest.raises(UserError, match='choose another --work-dir'):
        run.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


@pytest.mark.parametrize('task', list(run.TASKS))
def test_demo_as_it_is_changes_nothing_in_its_config(task):
    spec = run.TASKS[task]
    config = HOME / 'configs' / 'demo' / spec.config
    folder = Path('data') / run.LAYOUTS[task].name
    assert run._cfg_options(config, folder, 0, []) == []
    changes = run._cfg_options(config, Path('/elsewhere/x'), 1, [])
    assert 'randomness.seed=1' in changes
    assert 'train_dataloader.dataset.data_root=/elsewhere/x/' in changes
    evaluator = [c for c in changes if 'ann_file' in c]
    assert len(evaluator) == (2 if task == 'detection' else 0)


def test_summary_of_log_lines():
    start = '11/22 05:03:45 - mmengine - INFO - '
    assert summary(start + 'Checkpoints will be saved to x.') is None
    assert (
        summary(
            start + 'Epoch(train)  [1][40/63]  lr: 3.4e-02  eta: 0:10:52  '
            'time: 1.1  data_time: 0.02  loss: 1.64  loss_cls: 0.3'
        )
        == 'epoch 1  40/63  eta 0:10:52  loss 1.64'
    )
    assert (
        summary(start + 'Iter(val) [10/10]    aAcc: 90.08  mIoU: 8.19')
        == 'val  10/10  mIoU 8.19'
    )


def test_progress_off_a_terminal_is_sparse(capsys):
    line = 'INFO - Epoch(train) [1][{}/63]  eta: 0:00:09  loss: 1.0'
    with Progress(every=3600) as progress:
        for step in range(63):
            progress.read(line.format(step))
        progress.read('INFO - Epoch(val) [1][2/2]    accuracy/top1: 97.0')
    assert capsys.readouterr().out == '  val  2/2  accuracy/top1 97.0\n'


def test_progress_keeps_errors(capsys):
    """A detector that finds nothing gets no figure; the log says why."""
    with Progress(every=3600) as progress:
        progress.read(
            '11/26 12:00:00 - mmengine - ERROR - a/b.py - compute_metrics - '
            '463 - The testing results of the whole dataset is empty.'
        )
        progress.read('11/26 12:00:00 - mmengine - WARNING - an old name')
    expected = '  The testing results of the whole dataset is empty.\n'
    assert capsys.readouterr().out == expected


def test_latency_calls_in_turn():
    calls = []
    seconds = interleaved_latency(
        [lambda: calls.append('a'), lambda: calls.append('b')], rounds=3
    )
    assert calls == ['a', 'b'] * 5
    assert len(seconds) == 2 and min(seconds) >= 0
