"""tools/report.py: networks of the packages, their data, their evaluators."""

import dataclasses
import re

import pytest
import torch
from helpers import randomize, run_tool
from mmengine.config import Config
from networks import SIZE, write_checkpoint, write_config
from PIL import Image
from runs import run_config

from mmdbb.deploy import Source, deploy_checkpoint
from mmdbb.errors import UserError
from mmdbb.mm.checkpoint_report import (
    CheckpointReportOptions,
    report_checkpoint,
)
from mmdbb.mm.deploy.load import build_model
from mmdbb.report import page

pytestmark = pytest.mark.usefixtures('quiet')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A classifier's config that can be tested, and a checkpoint with EMA."""
    folder = tmp_path_factory.mktemp('run')
    cfg = run_config(folder / 'work')
    cfg.test_dataloader = dict(
        cfg.val_dataloader, sampler=dict(type='DefaultSampler', shuffle=False)
    )
    # Once with all branches, and once without each kind.
    scores = [0.5, 0.25, 0.125, 0.375, 0.0625]
    cfg.test_evaluator = dict(type='ScriptOfTests', scores=scores)
    cfg.test_cfg = dict()
    cfg.dump(folder / 'config.py')
    states = [
        randomize(build_model(cfg), seed).state_dict() for seed in (0, 1)
    ]
    averaged = {f'module.{k}': v for k, v in states[1].items()}
    torch.save(
        dict(
            state_dict=states[0],
            ema_state_dict=dict(averaged, steps=torch.tensor(3)),
            meta=dict(epoch=2),
        ),
        folder / 'trained.pth',
    )
    return folder


def report(run, out, *options):
    files = run / 'config.py', run / 'trained.pth', out
    return run_tool('report', *files, *options)


def test_a_classifier_on_its_data(run, tmp_path, capsys):
    out = tmp_path / 'report.html'
    options = ('--data', 3, '--evaluate', '--title', 'Mine')
    assert report(run, out, *options) == 0
    said = capsys.readouterr().out
    assert 'kxk supplies most' in said or 'supplies most of' in said
    assert said.splitlines()[-1] == f'page: {out}'
    text = out.read_text(encoding='utf-8')
    assert '<h1>Mine</h1>' in text and '✓ proven' in text
    assert 'ImageClassifier (ResNetDBB, GlobalAveragePooling' in text
    assert '3 of the test set, 24 × 32 pixels' in text
    assert 'ema_state_dict' in text or 'averaged' in text
    assert 'good (unit unknown)' in text
    for score in ('0.25', '0.125', '0.375', '0.0625'):
        assert f'>{score}<' in text
    assert 'backbone.layer1.0.conv1' in text.replace('<wbr>', '')


def test_weights_are_chosen(run, tmp_path):
    source = Source(
        Config.fromfile(run / 'config.py'), str(run / 'trained.pth')
    )
    options = CheckpointReportOptions(image_size=(24, 32), drop=False)
    found = []
    for ema in (True, False):
        out = str(tmp_path / f'{ema}.html')
        one = dataclasses.replace(source, ema=ema)
        found.append(report_checkpoint(one, out, options))
        assert (tmp_path / f'{ema}.html').read_text('utf-8') == page(found[-1])
    first, second = (f.layers[0].branches['kxk'].share for f in found)
    assert first != second
    assert found[0].images == 2  # random ones
    assert found[0].layers[0].branches['kxk'].lost is None


def test_a_detector_and_images_from_files(tmp_path, capsys):
    config = write_config(tmp_path, 'detector')
    trained = write_checkpoint(config, tmp_path / 'trained.pth')
    files = [tmp_path / f'{i}.png' for i in range(2)]
    for i, path in enumerate(files):
        pixels = torch.randint(0, 256, (40 + i, 50, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    out = tmp_path / 'report.html'
    run = ('report', config, trained, out, '--image-size', *SIZE)
    assert run_tool(*run, '--images', *files) == 0
    text = out.read_text(encoding='utf-8').replace('<wbr>', '')
    assert '2 given, 64 × 64 pixels' in text  # padded
    # The heads that images reach, and those that they do not.
    for name in (
        'neck.fpn_convs.0.conv',
        'roi_head.bbox_head.shared_convs.0.conv',
        'backbone.layer2.0.conv2',
    ):
        assert name in text
    assert '✓ proven' in text and 'was compared layer by layer only' in text
    capsys.readouterr()


def test_a_segmentor(tmp_path, capsys):
    config = write_config(tmp_path, 'segmentor')
    trained = write_checkpoint(config, tmp_path / 'trained.pth')
    out = tmp_path / 'report.html'
    options = ('--image-size', 32, 32, '--no-drop')
    assert run_tool('report', config, trained, out, *options) == 0
    text = out.read_text(encoding='utf-8').replace('<wbr>', '')
    assert 'auxiliary_head.convs.0.conv' in text
    assert re.search(r'<code>kx1</code>', text)  # ACB in one head
    assert 'Network without it' not in text
    capsys.readouterr()


def test_mistakes_end_with_one_line(run, tmp_path, capsys):
    old = tmp_path / 'old.html'
    old.write_text('mine')
    new = tmp_path / 'new.html'
    image = tmp_path / 'none.png'
    for out, options, message in [
        (old, (), f'output exists: {old}; choose another name or pass --for'),
        ('r.pdf', (), 'the output must end in .html or .htm, got r.pdf'),
        (new, ('--data', '0'), 'argument --data: must be a whole number from'),
        (new, ('--data', '1', '--images', 'a'), 'argument --images: not allo'),
        (new, ('--images', image), f'no such image: {image}'),
        (new, ('--image-size', '0', '9'), 'argument --image-size: must be'),
        (new, ('--metric', 'best', '--image-size', 24, 32), 'the evaluator g'),
    ]:
        assert report(run, out, *options) == 2, message
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f'report.py: {message}'), line
        assert [p.name for p in tmp_path.iterdir()] == ['old.html']
    assert old.read_text() == 'mine'


def test_merged_weights_are_refused(run, tmp_path):
    cfg = Config.fromfile(run / 'config.py')
    source = Source(cfg, str(run / 'trained.pth'))
    merged = deploy_checkpoint(source, str(tmp_path / 'merged.pth'))
    again = Source(cfg, merged.checkpoint)
    with pytest.raises(UserError, match='is merged already'):
        report_checkpoint(again, str(tmp_path / 'r.html'))
    assert not (tmp_path / 'r.html').exists()
