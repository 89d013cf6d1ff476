"""tools/reparam.py as a command: its options, and what it says."""

import itertools
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import randomize, run_tool
from mmengine.config import Config
from runs import run_config
from torch import nn

from mmdbb import load_deployed
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.mm.deploy.load import build_model
from mmdbb.modules import unwrapped
from mmdbb.reparam import find_blocks

pytestmark = pytest.mark.usefixtures('quiet')
TOOLS = Path(__file__).resolve().parents[2] / 'tools'
NUMBERS = itertools.count()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A config that can be tested, and a checkpoint with EMA."""
    folder = tmp_path_factory.mktemp('run')
    cfg = run_config(folder / 'work')
    cfg.test_dataloader = dict(
        cfg.val_dataloader, sampler=dict(type='DefaultSampler', shuffle=False)
    )
    cfg.test_evaluator = dict(type='ScriptOfTests', scores=[1.0])
    cfg.test_cfg = dict()
    cfg.dump(folder / 'config.py')
    states = [
        randomize(build_model(cfg), seed).state_dict() for seed in (0, 1)
    ]
    source = {f'module.{k}': v for k, v in states[1].items()}
    torch.save(
        dict(
            state_dict=states[0],
            ema_state_dict=dict(source, steps=torch.tensor(3)),
            meta=dict(epoch=2),
        ),
        folder / 'trained.pth',
    )
    return folder


def reparam(run, out, *options):
    return run_tool(
        'reparam',
        run / 'config.py',
        run / 'trained.pth',
        out,
        '--image-size',
        32,
        24,
        *options,
    )


@pytest.mark.parametrize(
    'options, weights',
    [
        ((), 'the averaged ones, state_dict'),
        (('--ema',), 'the averaged ones, state_dict'),
        (('--no-ema', '--dtype', 'float32'), 'the trained ones, ema_state_di'),
    ],
)
def test_ema(run, tmp_path, capsys, options, weights):
    out = tmp_path / 'a.pth'
    assert reparam(run, out, *options) == 0
    text = capsys.readouterr().out
    assert f'took the weights: {weights}' in text
    assert 'merged 8 blocks' in text and 'are left' not in text
    own = read_checkpoint(str(out))['meta']['mmdbb']
    assert own['weights'].startswith(weights)


def test_part(run, tmp_path, capsys):
    out = tmp_path / 'a.pth'
    options = ('--only', '*layer1*', '*layer2.0*', '--skip', '*conv2')
    assert reparam(run, out, *options) == 0
    text = capsys.readouterr().out
    assert 'merged 3 blocks' in text
    assert '5 blocks are left: the result needs mmdbb' in text
    model = load_deployed(str(out.with_suffix('.py')), str(out))
    assert sum(b.deploy for b in find_blocks(model).values()) == 3


@pytest.mark.parametrize(
    'options, message',
    [
        (('--only', 'nothing'), '--only nothing fits no block; the blocks ar'),
        (('--work-dir', 'x'), 'unrecognized arguments: --work-dir'),
        (('--dtype', 'float16'), "invalid choice: 'float16'"),
        (('--tolerance', '0'), 'more than the tolerance 0e+00'),
        (('--fuse', '--format', 'onnx'), 'not allowed with argument --fuse'),
        (('--format', 'onnx', '--fuse'), 'not allowed with argument --format'),
    ],
)
def test_refused(run, tmp_path, capsys, options, message):
    assert reparam(run, tmp_path / 'a.pth', *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith('reparam.py: ')
    assert os.listdir(tmp_path) == []


def test_unsafe_load(run, tmp_path, capsys):
    loaded = torch.load(run / 'trained.pth')
    loaded['meta']['path'] = Path('a')  # of pathlib
    torch.save(loaded, tmp_path / 'in.pth')
    arguments = ('reparam', run / 'config.py', tmp_path / 'in.pth')
    arguments += (tmp_path / 'a.pth', '--image-size', 32, 24)
    assert run_tool(*arguments) == 2
    error = capsys.readouterr().err
    assert 'which is not allowed' in error and '--unsafe-load' in error
    assert run_tool(*arguments, '--unsafe-load') == 0
    meta = read_checkpoint(str(tmp_path / 'a.pth'))['meta']
    assert meta['epoch'] == 2 and 'path' not in meta


@pytest.mark.parametrize('options', [(), ('--fuse',)])
def test_safetensors_are_tested(run, tmp_path, options):
    pytest.importorskip('safetensors')
    found = []
    for suffix in ('.pth', '.safetensors'):
        out = tmp_path / f'plain{suffix}'
        assert reparam(run, out, '--force', *options) == 0
        predictions = tmp_path / f'{suffix}.pkl'
        code = run_tool(
            'test',
            out.with_suffix('.py'),
            out,
            '--work-dir',
            tmp_path,
            '--out',
            predictions,
            '--cfg-options',
            f'experiment_name=reparam{next(NUMBERS)}',
        )
        assert code == 0
        samples = pickle.loads(predictions.read_bytes())
        found.append(torch.stack([s['pred_score'] for s in samples]))
    assert torch.equal(*found)
    backbone = Config.fromfile(tmp_path / 'plain.py').model.backbone
    assert backbone.type == 'mmpretrain.ResNet'


def test_a_network_is_found_in_its_wrappers():
    model = nn.Conv2d(3, 4, 1)
    wrapped = nn.DataParallel(nn.DataParallel(model))
    assert unwrapped(wrapped) is model
    assert unwrapped(model) is model
