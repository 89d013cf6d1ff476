"""Deploy files beside each best checkpoint; training does not notice."""

import os

import pytest
import torch
import torch.distributed as dist
from helpers import distance, image
from mmengine.registry import HOOKS
from runs import run_config, train

from mmdbb import ReparamHook, load_deployed
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.mm.deploy.load import build_model

pytestmark = pytest.mark.usefixtures('quiet')
HOOK = dict(type='ReparamHook', image_size=(32, 24))
EMA = dict(type='EMAHook', momentum=0.3)


def hooks(**options):
    return dict(custom_hooks=[EMA, dict(HOOK, **options)])


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The same training with and without the hook: best of epochs 1, 3."""
    folder = tmp_path_factory.mktemp('runs')
    scores = (2.0, 1.0, 3.0, 2.5)
    found = {}
    for name, changes in dict(without={}, with_hook=hooks()).items():
        runner = train(run_config(folder / name, scores, **changes))
        found[name] = (folder / name, runner)
    return found


def files(folder):
    # The runner's own copy of a config without a file is tmp*.py.
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith('tmp')
    )


def test_the_best_has_its_deploy_files(runs):
    folder, runner = runs['with_hook']
    best = 'best_good_epoch_3'
    assert files(folder) == [
        f'{best}.pth',
        f'{best}_deploy.pth',
        f'{best}_deploy.py',
        'epoch_4.pth',
        'last_checkpoint',
    ]
    model = build_model(runner.cfg)
    loaded = read_checkpoint(str(folder / f'{best}.pth'))
    model.load_state_dict(loaded['state_dict'])
    deployed = load_deployed(
        str(folder / f'{best}_deploy.py'), str(folder / f'{best}_deploy.pth')
    )
    assert type(deployed.backbone).__name__ == 'ResNet'
    x = image(2, 3, 24, 32, dtype=torch.float32)
    assert distance(deployed(x), model(x)) < 1e-5


def flat(node, name=''):
    """All leaves of a checkpoint, by path."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return {name: node}
    return {k: v for i, n in items for k, v in flat(n, f'{name}.{i}').items()}


def test_training_is_the_same_bit_by_bit(runs):
    last = [
        torch.load(runs[name][0] / 'epoch_4.pth', weights_only=False)
        for name in ('without', 'with_hook')
    ]
    keys = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    first, second = (flat({k: each[k] for k in keys}) for each in last)
    assert first.keys() == second.keys()
    assert sum(isinstance(v, torch.Tensor) for v in first.values()) > 100
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert str(value) == str(second[name]), name


def test_the_model_is_left_as_it_was(runs):
    model, other = (runs[n][1].model for n in ('with_hook', 'without'))
    assert [m.training for m in model.modules()] == [
        m.training for m in other.modules()
    ]
    for a, b in zip(model.parameters(), other.parameters()):
        assert a.requires_grad is b.requires_grad
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_resumed_runs_replace_the_older_files(tmp_path):
    train(run_config(tmp_path / 'run', (1.0,), **hooks()))
    deployed = tmp_path / 'run' / 'best_good_epoch_1_deploy.pth'
    assert deployed.is_file()
    again = run_config(tmp_path / 'run', (1.0, 2.0), **hooks())
    again.resume, again.experiment_name = True, 'again'
    again.val_evaluator.scores = [2.0]
    train(again)
    names = [n for n in files(tmp_path / 'run') if n.startswith('best')]
    assert names == [
        'best_good_epoch_2.pth',
        'best_good_epoch_2_deploy.pth',
        'best_good_epoch_2_deploy.py',
    ]


def test_each_metric_has_its_best(tmp_path):
    changes = dict(hooks(suffix='-plain'))
    cfg = run_config(tmp_path / 'run', (2.0, 1.0), **changes)
    cfg.default_hooks.checkpoint.save_best = ['good', 'other']
    train(cfg)
    names = [n for n in files(tmp_path / 'run') if n.endswith('plain.pth')]
    assert names == [
        'best_good_epoch_1-plain.pth',
        'best_other_epoch_2-plain.pth',
    ]


def test_what_cannot_be_merged_is_logged(tmp_path):
    cfg = run_config(tmp_path / 'run', (1.0, 2.0), **hooks(tolerance=0.0))
    runner = train(cfg)
    assert runner.epoch == 2
    names = files(tmp_path / 'run')
    assert not [n for n in names if 'deploy' in n]
    assert 'best_good_epoch_2.pth' in names
    log = next((tmp_path / 'run').rglob('*.log')).read_text()
    assert 'best_good_epoch_2.pth is not merged: ' in log
    assert 'differs by' in log


def test_only_the_first_process_writes(tmp_path):
    fake = pytest.importorskip('torch.testing._internal.distributed.fake_pg')
    cfg = run_config(tmp_path / 'run', (1.0,), **hooks())
    runner = train(cfg)
    written = [n for n in files(tmp_path / 'run') if 'deploy' in n]
    assert len(written) == 2
    for name in written:
        os.remove(tmp_path / 'run' / name)
    hook = next(h for h in runner.hooks if isinstance(h, ReparamHook))
    path = runner.message_hub.get_info('best_ckpt')
    dist.init_process_group(
        'fake', store=fake.FakeStore(), rank=1, world_size=2
    )
    try:
        hook._deploy(runner, path, None)
    finally:
        dist.destroy_process_group()
    assert not [n for n in files(tmp_path / 'run') if 'deploy' in n]
    hook._deploy(runner, path, None)
    assert [n for n in files(tmp_path / 'run') if 'deploy' in n] == written


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_every_scope_knows_it(scope):
    hook = HOOKS.build(dict(HOOK, _scope_=scope))
    assert isinstance(hook, ReparamHook) and hook.priority == 'LOWEST'


def test_empty_suffix():
    with pytest.raises(ValueError, match="suffix must not be empty; got ''"):
        ReparamHook(suffix='')
