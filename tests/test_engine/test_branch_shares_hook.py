"""What is logged of the branches while training, and that nothing changes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import HOOKS
from mmengine.visualization import Visualizer
from runs import run_config, train

from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.engine import branch_shares_hook
from mmdbb.mm.engine.branch_shares_hook import BranchSharesHook
from mmdbb.modules import unwrapped
from mmdbb.reparam import reparameterize
from mmdbb.shares import model_shares

pytestmark = pytest.mark.usefixtures('quiet')
LAYERS = [
    f'layer{i}.{j}.conv{k}' for i in (1, 2) for j in (0, 1) for k in (1, 2)
]
BRANCHES = ['kxk', '1x1', '1x1_kxk', '1x1_avg']


def config(folder, *hooks, epochs=2):
    """Two iterations an epoch."""
    cfg = run_config(folder / 'run', [float(i) for i in range(epochs)])
    cfg.custom_hooks = list(hooks)
    cfg.visualizer = dict(
        type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]
    )
    return cfg


def logged(runner, figure='projection/'):
    """Step -> the hook's entries in the file of the local backend."""
    (path,) = Path(runner.log_dir).glob('**/scalars.json')
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        row['step']: {k: v for k, v in row.items() if k.startswith(figure)}
        for row in rows
        if any(k.startswith(figure) for k in row)
    }


def test_what_is_in_the_log(tmp_path):
    hook = dict(type='BranchSharesHook', interval=3)
    runner = train(config(tmp_path, hook))
    found = logged(runner)
    # At the start, every three iterations, and at the end.
    assert [*found] == [0, 3, 4]
    names = {
        f'projection/{layer}/{branch}'
        for branch in BRANCHES
        for layer in ('mean', *(f'backbone.{name}' for name in LAYERS))
    }
    for row in found.values():
        assert {*row} == names
        for layer in LAYERS:
            parts = [row[f'projection/backbone.{layer}/{b}'] for b in BRANCHES]
            assert sum(parts) == pytest.approx(1)
    assert found[0] != found[4]
    last = model_shares(unwrapped(runner.model))
    for layer in LAYERS:
        for branch, share in last[f'backbone.{layer}'].branches.items():
            value = found[4][f'projection/backbone.{layer}/{branch}']
            assert value == pytest.approx(share.projection)
    mean = sum(
        last[f'backbone.{layer}'].branches['1x1'].projection
        for layer in LAYERS
    ) / len(LAYERS)
    assert found[4]['projection/mean/1x1'] == pytest.approx(mean)


def test_the_training_is_the_same_with_it(tmp_path):
    states = []
    for i, hooks in enumerate(
        ([], [dict(type='BranchSharesHook', interval=1)])
    ):
        runner = train(config(tmp_path / str(i), *hooks))
        states.append((runner.model.state_dict(), torch.rand(3)))
    (first, drawn), (second, then) = states
    assert torch.equal(drawn, then)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_averaged_weights_and_figures(tmp_path):
    averaging = dict(type='EMAHook', momentum=0.3)
    hook = dict(
        type='BranchSharesHook',
        ema=True,
        each=False,
        figures=['share', 'norm'],
        interval=100,
    )
    runner = train(config(tmp_path, averaging, hook))
    (averaged,) = [
        h.ema_model.module for h in runner.hooks if hasattr(h, 'ema_model')
    ]
    found = logged(runner, ('share/', 'norm/'))
    assert {*found[4]} == {
        f'{figure}/mean/{b}' for b in BRANCHES for figure in ('share', 'norm')
    }
    # After the training EMAHook's weights and the network's are swapped or
    # not; the hook's must be those of the average.
    shares = [model_shares(network) for network in (averaged, runner.model)]
    means = [
        sum(s.branches['kxk'].norm for s in each.values()) / len(LAYERS)
        for each in shares
    ]
    assert found[4]['norm/mean/kxk'] == pytest.approx(means[0])
    assert means[0] != pytest.approx(means[1], rel=1e-9)


@pytest.mark.parametrize('case', ['merged', 'no EMA', 'broken'])
def test_it_never_ends_a_training(case, tmp_path):
    said, scalars = [], []
    model = build_model(run_config(tmp_path / 'run'))
    hook = BranchSharesHook(interval=1, ema=case == 'no EMA')
    if case == 'merged':
        model = reparameterize(model)
    elif case == 'broken':
        block = next(m for m in model.modules() if hasattr(m, 'branches'))
        block.branches['kxk'].conv.stride = (3, 3)
    runner = SimpleNamespace(
        model=model,
        iter=0,
        hooks=[hook],
        logger=SimpleNamespace(warning=said.append),
        visualizer=SimpleNamespace(
            add_scalars=lambda *a, **k: scalars.append(a)
        ),
    )
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    hook.after_train(runner)
    assert not scalars
    (line,) = said  # once, not at every step
    assert line.startswith('BranchSharesHook logs nothing: ')
    reason = {
        'merged': 'the network has no block with branches',
        'no EMA': 'ema=True needs an EMAHook in custom_hooks',
        'broken': 'backbone.',
    }
    assert reason[case] in line


def test_only_the_main_process_logs(monkeypatch, tmp_path):
    monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: 1)
    hook = BranchSharesHook()
    hook.before_train(None)  # would read the runner
    assert hook._last is None


def test_dead_blocks_are_left_out(tmp_path):
    """Shares of a merged kernel of zeros are no numbers."""
    hook, model = BranchSharesHook(), build_model(run_config(tmp_path / 'r'))
    block = model.backbone.layer1[0].conv1
    for branch in block.branches.values():
        branch.last_norm.weight.data.zero_()
    scalars = hook._scalars(model_shares(model))
    assert not [k for k in scalars if 'layer1.0.conv1' in k]
    assert len(scalars) == 4 * len(LAYERS)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(interval=0), 'interval must be a whole number .* got 0'),
        (dict(interval=1.5), 'interval must be a whole number .* got 1.5'),
        (dict(interval=True), 'interval must be a whole number .* got True'),
        (dict(figures='share'), "must be a list of .*; got 'share'"),
        (dict(figures=[]), r'must be a list of .*; got \[\]'),
        (dict(figures=['share', 'angle']), "some of .*; got 'angle'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build(dict(type='BranchSharesHook', **arguments))


def test_tensorboard_gets_them(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    cfg = config(tmp_path, dict(type='BranchSharesHook', interval=2))
    cfg.visualizer.vis_backends = [dict(type='TensorboardVisBackend')]
    runner = train(cfg)
    (file,) = Path(runner.log_dir).glob('**/events.*')
    events = EventAccumulator(str(file))
    events.Reload()
    values = events.Scalars('projection/backbone.layer1.0.conv1/1x1')
    assert [event.step for event in values] == [0, 2, 4]
    runner.visualizer.close()


def test_wandb_gets_them(tmp_path, monkeypatch):
    """By mmengine's own backend; what it calls is written down."""
    rows = []
    stub = SimpleNamespace(
        init=lambda **kwargs: SimpleNamespace(log_code=lambda **k: None),
        log=lambda row, **kwargs: rows.append((row, kwargs)),
        join=lambda: None,
        define_metric=lambda *a, **k: None,
        run=SimpleNamespace(log_code=lambda **k: None),
        watch=lambda *a, **k: None,
        config=SimpleNamespace(update=lambda *a, **k: None),
    )
    monkeypatch.setitem(sys.modules, 'wandb', stub)
    visualizer = Visualizer(
        'of the test',
        vis_backends=[dict(type='WandbVisBackend')],
        save_dir=str(tmp_path),
    )
    model = build_model(run_config(tmp_path / 'run'))
    runner = SimpleNamespace(
        model=model, iter=6, visualizer=visualizer, hooks=[]
    )
    BranchSharesHook(each=False).before_train(runner)
    ((row, _),) = rows
    assert {k for k in row if '/' in k} == {
        f'projection/mean/{b}' for b in BRANCHES
    }


def test_blocks_are_measured_once(tmp_path, monkeypatch):
    """The last iteration and the end of the training are one entry."""
    calls = []
    measure = branch_shares_hook.model_shares

    def counted(model):
        calls.append(1)
        return measure(model)

    monkeypatch.setattr(branch_shares_hook, 'model_shares', counted)
    train(config(tmp_path, dict(type='BranchSharesHook', interval=2)))
    assert len(calls) == 3
