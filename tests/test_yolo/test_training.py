"""Blocks in ultralytics' own training, from its start to a merged file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_docs import ROOT, run_snippets

from mmdbb.reparam import find_blocks
from mmdbb.yolo import TrainerWithBlocks

ultralytics = pytest.importorskip('ultralytics')
train = pytest.importorskip('ultralytics.models.yolo.detect')

SMALL = dict(imgsz=64, batch=4, plots=False, workers=0, device='cpu')


class Trainer(TrainerWithBlocks, train.DetectionTrainer):
    pass


@pytest.fixture
def folder(tmp_path, monkeypatch, digits):
    """Where a training writes; the data set's file is there too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'digits.yaml').write_text(digits.read_text())
    monkeypatch.setitem(ultralytics.settings, 'runs_dir', str(tmp_path))
    return tmp_path


def test_the_page_is_true(folder):
    found = run_snippets(ROOT / 'docs' / 'yolo.md')
    assert Path(found['path']).suffix == '.torchscript'
    # The trainer's last validation fused a copy: the file has the blocks.
    best = ultralytics.YOLO(found['best'])
    assert len(find_blocks(best.model)) == 42
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = best.model.eval()(images)[0]
        other = ultralytics.YOLO('merged.pt')
        assert not find_blocks(other.model)
        result = other.model.eval()(images)[0]
    # Two checkpoints in half precision lie between the two.
    assert (result - expected).abs().max() < 1e-2 * expected.abs().max()
    # And the merged one needs no mmdbb.
    code = (
        'import sys; sys.modules["mmdbb"] = None\n'
        'from ultralytics import YOLO\n'
        'model = YOLO("merged.pt")\n'
        'model.val(data="digits.yaml", imgsz=64, plots=False)\n'
        'model.train(data="digits.yaml", epochs=1, imgsz=64, batch=4, '
        'plots=False)\n'
    )
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_a_training_goes_on(folder):
    model = ultralytics.YOLO('yolov8n.yaml')

    def stop(trainer):
        if trainer.epoch == 0:
            raise KeyboardInterrupt

    model.add_callback('on_model_save', stop)
    with pytest.raises(KeyboardInterrupt):
        model.train(trainer=Trainer, data='digits.yaml', epochs=2, **SMALL)
    last = model.trainer.last
    saved = ultralytics.YOLO(last)
    assert find_blocks(saved.model)
    weights = []
    saved.add_callback(
        'on_train_start',
        lambda trainer: weights.append(
            {k: v.clone() for k, v in trainer.model.state_dict().items()}
        ),
    )
    before = {k: v.clone() for k, v in saved.model.state_dict().items()}
    saved.train(trainer=Trainer, resume=True)
    assert saved.trainer.start_epoch == 1
    assert len(find_blocks(saved.model)) == 39
    assert weights[0].keys() == before.keys()
    for name, value in weights[0].items():
        assert torch.equal(value.float(), before[name].float()), name


def test_it_starts_from_trained_weights(folder):
    ultralytics.YOLO('yolov8n.yaml').save('plain.pt')
    plain = ultralytics.YOLO('plain.pt')
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain.model.eval()(images)[1]['boxes']
    started = []

    def keep(trainer):
        ema = trainer.ema.ema.eval()
        with torch.no_grad():
            started.append(ema(images)[1]['boxes'])
        assert len(find_blocks(ema)) == 39

    plain.add_callback('on_train_start', keep)
    plain.train(trainer=Trainer, data='digits.yaml', epochs=1, **SMALL)
    assert (started[0] - expected).abs().max() < 1e-4 * expected.abs().max()
