"""Penalties on equivalent kernels, and networks with fewer filters."""

import copy
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import distance, image, randomize, run_tool
from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvWS2d
from mmengine.config import Config
from registered import each_block
from runs import run_config, train
from torch import nn

import mmdbb
from mmdbb import DBB, load_deployed
from mmdbb.errors import UserError
from mmdbb.mm.engine import launch
from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.outputs import Source
from mmdbb.mm.pruning import fine_tuning
from mmdbb.mm.pruning.fine_tuning import PruneOptions
from mmdbb.mm.pruning.penalty import (
    KernelPenaltyHook,
    filter_lengths,
    group_lasso,
    kernel_penalty,
    l1,
    penalized_blocks,
)
from mmdbb.mm.pruning.pipeline import print_pruned, prune_checkpoint
from mmdbb.mm.pruning.structure import cost_of, prune_

ROOT = Path(mmdbb.__file__).parents[1]
FEW = Calibration(8)

# Penalties


def test_penalties_exact():
    kernel = torch.tensor([[3.0, -4.0], [0.0, 0.0]]).reshape(2, 2, 1, 1)
    assert l1(kernel).item() == 7
    assert group_lasso(kernel).item() == pytest.approx(2**0.5 * 5)


@pytest.mark.parametrize('kind', ['l1', 'group_lasso'])
@each_block(argument='block')
def test_penalty_reaches_all_that_makes_the_kernel(kind, block):
    model = nn.Sequential(randomize(block(4, 4, 3).double()))
    kernel = model[0].get_equivalent_kernel_bias().kernel
    function = dict(l1=l1, group_lasso=group_lasso)[kind]
    penalty = kernel_penalty(model, kind)
    assert penalty.item() == pytest.approx(function(kernel).item())
    penalty.backward()
    for name, parameter in model.named_parameters():
        if 'bias' not in name:
            assert parameter.grad.abs().max() > 0, name


def test_a_filter_of_zeros_has_a_gradient():
    kernel = torch.zeros(2, 3, 1, 1, requires_grad=True)
    group_lasso(kernel).backward()
    assert kernel.grad.isfinite().all()


def test_layers_are_chosen_by_name():
    model = nn.ModuleDict(dict(a=DBB(3, 4, 3), b=DBB(4, 4, 3)))
    assert list(penalized_blocks(model, ['^a'])) == ['a']
    assert list(penalized_blocks(model, 'b$')) == ['b']
    whole = kernel_penalty(model)
    parts = kernel_penalty(model, layers='a') + kernel_penalty(
        model, layers='b'
    )
    assert whole.item() == pytest.approx(parts.item())
    with pytest.raises(
        ValueError, match="layers='c' matches no block; .*a, b"
    ):
        kernel_penalty(model, layers=['a', 'c'])
    with pytest.raises(ValueError, match='kind must be one of l1, group_la'):
        kernel_penalty(model, 'l2')
    with pytest.raises(ValueError, match='ReLU has no blocks'):
        kernel_penalty(nn.ReLU())
    with pytest.raises(ValueError, match='weight must be greater than 0'):
        KernelPenaltyHook(0.0)


def test_a_training_makes_filters_short(tmp_path):
    lengths = {}
    for weight in (1e-9, 0.03):
        folder = tmp_path / f'{weight}'
        cfg = run_config(folder)
        cfg.custom_imports.imports.append('mmdbb.prune')
        cfg.custom_hooks = [dict(type='KernelPenaltyHook', weight=weight)]
        cfg.default_hooks.logger = dict(type='LoggerHook', interval=1)
        runner = train(cfg)
        assert 'parse_losses' not in vars(runner.model)
        found = filter_lengths(runner.model)
        lengths[weight] = sum(map(sum, found.values()))
        log = [json.loads(x) for x in next(folder.glob('*/*/*.json')).open()]
        said = [entry for entry in log if 'loss' in entry]
        assert said and all(entry['loss_kernel'] > 0 for entry in said)
    assert lengths[0.03] < 0.99 * lengths[1e-9]


# Pruning


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
    ).eval()


def test_the_shortest_filters_go_and_nothing_else_changes():
    pytest.importorskip('torch_pruning')
    model = small()
    with torch.no_grad():
        for i in (1, 6):  # what gives and reads these two is nothing
            model[0].weight[i] = model[0].bias[i] = 0
            model[3].weight[i] = model[3].bias[i] = 0
            model[5].weight[:, i] = 0
    before = copy.deepcopy(model)
    changed = prune_(model, 0.25, (8, 9))
    assert changed == {'0': (8, 6), '3': (8, 6)}
    assert model[3].groups == 6 and model[5].out_channels == 5
    x = image(2, 3, 8, 9, dtype=torch.float32)
    assert distance(model(x), before(x)) < 1e-6
    assert cost_of(model, (8, 9)).flops < cost_of(before, (8, 9)).flops
    assert cost_of(before, (8, 9)).flops == 2 * 72 * (216 + 72 + 40)


@pytest.mark.parametrize(
    'ratio, model, message',
    [
        (1.5, small, 'the ratio must lie between 0 and 1, got 1.5'),
        (0.0, small, 'the ratio must lie between 0 and 1, got 0'),
        (0.5, lambda: nn.Sequential(DBB(3, 4, 3)), 'is not merged'),
        (
            0.5,
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1)),
            'no filter was removed by ratio 0.5: all layers belong to heads',
        ),
        (
            0.99,
            lambda: small()[:5].append(nn.Conv2d(8, 2, 1)),
            'by ratio 0.99: it is too large for the layers, which would have',
        ),
    ],
)
def test_what_cannot_be_pruned(ratio, model, message):
    pytest.importorskip('torch_pruning')
    with pytest.raises(UserError, match=message):
        prune_(model(), ratio, (8, 8))


@pytest.mark.parametrize('kind', [ConvWS2d, Conv2dAdaptivePadding])
def test_a_forward_of_its_own_is_pruned_right_or_left(kind, quiet):
    """A kernel that is not its weight changes with each channel it loses."""
    pytest.importorskip('torch_pruning')
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        kind(8, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
    ).eval()
    own = kind is ConvWS2d
    removed = dict.fromkeys(['0'] if own else ['0', '2', '4'], (8, 4))
    x = image(2, 3, 8, 9, dtype=torch.float32)
    masked = copy.deepcopy(model)
    assert prune_(model, 0.5, (8, 9), each_layer=True) == removed
    # Only the first layer's filters lost no channel, so they can be compared.
    kept = list(model[0].weight)
    with torch.no_grad():
        for weight in masked[0].weight:
            if not any(torch.equal(weight, other) for other in kept):
                weight.zero_()
    if own:
        assert distance(model(x), masked(x)) < 1e-6


def test_what_parameters_require_and_their_modes_stay():
    pytest.importorskip('torch_pruning')
    model = small().train()
    model[1].eval()
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(UserError, match='too small to leave multiples of 8'):
        prune_(model, 0.1, (8, 9), round_to=8)
    assert [p.requires_grad for p in model.parameters()] == required
    prune_(model, 0.5, (8, 9))
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    'length, epochs', [(2, 2), (0.5, 4), (0.01, 1), (0.99, 8)]
)
def test_a_share_of_the_schedule(length, epochs, monkeypatch, trained):
    cfg = copy.deepcopy(trained('classification')[0])
    cfg.train_cfg.max_epochs = 8
    built = []

    def build(cfg):
        built.append(cfg)
        raise KeyboardInterrupt

    monkeypatch.setattr(fine_tuning, 'build_runner', build)
    monkeypatch.setattr(fine_tuning, 'check_data', lambda *a: None)
    with pytest.raises(KeyboardInterrupt):
        fine_tuning.train_on_(
            nn.Identity(), cfg, cfg, PruneOptions(length=length)
        )
    assert built[0].train_cfg.max_epochs == epochs
    assert built[0].param_scheduler[0].T_max == epochs
    cfg.train_cfg = dict(by_epoch=False, max_iters=300)
    with pytest.raises(KeyboardInterrupt):
        fine_tuning.train_on_(
            nn.Identity(), cfg, cfg, PruneOptions(length=0.25)
        )
    assert built[1].train_cfg.max_iters == 75


@pytest.mark.parametrize(
    'task', ['classification', 'segmentation', 'detection']
)
def test_pipeline(task, trained, sizes, tmp_path, quiet, capsys):
    pytest.importorskip('torch_pruning')
    cfg, checkpoint = trained(task)
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(tmp_path / 'work')
    out = str(tmp_path / 'pruned.pth')
    result = prune_checkpoint(
        Source(cfg, checkpoint),
        out,
        PruneOptions(ratio=0.4, length=1, calibration=FEW),
        onnx=str(tmp_path / 'pruned.onnx'),
    )
    names = [stage.name for stage in result.stages]
    assert names == ['merged', 'pruned', 'trained on']
    first, second, third = (stage.cost for stage in result.stages)
    assert second.parameters < first.parameters and second.flops < first.flops
    assert third == second
    model = load_deployed(result.config, result.checkpoint)
    assert cost_of(model, sizes[task]) == third
    assert (tmp_path / 'pruned.onnx').exists()
    print_pruned(result)
    assert 'MFLOPs' in capsys.readouterr().out
    with pytest.raises(UserError, match='does not fit'):
        load_deployed(result.config, checkpoint)


def test_before_it_is_trained_on_the_network_is_the_merged_one(
    trained, tmp_path, quiet
):
    pytest.importorskip('torch_pruning')
    cfg, checkpoint = trained('classification')
    out = str(tmp_path / 'pruned.pth')
    result = prune_checkpoint(
        Source(cfg, checkpoint), out, PruneOptions(ratio=0.1, calibration=FEW)
    )
    model = load_deployed(result.config, out)
    state = torch.load(out, weights_only=True)
    assert state['meta']['mmdbb']['structure'] == 'pruned'
    assert result.filters[1] < result.filters[0]
    assert model.head.fc.out_features == 10
    with pytest.raises(UserError, match='output exists'):
        prune_checkpoint(
            Source(cfg, checkpoint),
            out,
            PruneOptions(ratio=0.1, calibration=FEW),
        )
    for mine in (checkpoint, cfg.filename[: -len('.py')] + '.pth'):
        with pytest.raises(UserError, match='is also an input'):
            prune_checkpoint(Source(cfg, checkpoint), mine, overwrite=True)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(length=-1), 'whole number of epochs or iterations.*, got -1'),
        (dict(length=1.5), 'or a share of the schedule below 1, got 1.5'),
        (dict(length=float('nan')), 'below 1, got nan'),
        (dict(length=1, lr_scale=0), 'scaled by more than 0, got 0'),
        (dict(onnx='out.pt'), 'the export must end in .onnx, got out.pt'),
    ],
)
def test_wrong_numbers(arguments, message, tmp_path):
    pytest.importorskip('torch_pruning')
    out = str(tmp_path / 'o.pth')
    onnx = arguments.pop('onnx', None)
    with pytest.raises(UserError, match=message):
        prune_checkpoint(
            Source(None, 'none.pth'), out, PruneOptions(**arguments), onnx
        )
    with pytest.raises(UserError, match='multiples of 1 or more, got 0'):
        prune_(small(), 0.5, (8, 8), round_to=0)


def test_fine_tuning_is_quiet_and_scales_the_rate(trained, tmp_path, capfd):
    """The log goes into the work folder; the learning rate fits the batch."""
    pytest.importorskip('torch_pruning')
    cfg, checkpoint = trained('classification')
    files = cfg.filename, checkpoint, tmp_path / 'pruned.pth'
    base = 4 * cfg.train_dataloader.batch_size
    scaled = (
        *('--length', 0.001, '--calib', 8, '--auto-scale-lr'),
        *('--work-dir', tmp_path / 'work', '--cfg-options'),
    )
    assert run_tool('prune', *files, *scaled, 'randomness.seed=0') == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.endswith(
        '--auto-scale-lr needs auto_scale_lr.base_batch_size in the config'
    )
    option = f'auto_scale_lr.base_batch_size={base}'
    assert run_tool('prune', *files, *scaled, option, 'log_level=INFO') == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) < 30 and not any('mmengine -' in x for x in lines)
    (log,) = (tmp_path / 'work').rglob('*.log')
    assert 'Scaling the original LR by 0.25' in log.read_text()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='--amp needs a GPU'):
            prune_checkpoint(
                Source(cfg, checkpoint),
                str(tmp_path / 'other.pth'),
                PruneOptions(length=1, amp=True),
            )


def test_a_missing_package(trained, tmp_path, monkeypatch):
    cfg, checkpoint = trained('classification')
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[pruning\]"$'):
        prune_checkpoint(Source(cfg, checkpoint), str(tmp_path / 'o.pth'))
    assert not list(tmp_path.iterdir())


def test_the_commands(trained, tmp_path):
    pytest.importorskip('torch_pruning')
    cfg, checkpoint = trained('classification')

    def run(tool, *arguments):
        command = [sys.executable, str(ROOT / 'tools' / tool), cfg.filename]
        return subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    failed = run('prune.py', checkpoint, 'out.pth', '--ratio', 2)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1] == (
        'prune.py: argument --ratio: must be a number between 0 and 1, got '
        "'2' (see prune.py --help)"
    )
    done = run('range_report.py', checkpoint)
    assert done.returncode == 0, done.stderr
    assert re.search('DBB', done.stdout)
    assert not list(tmp_path.iterdir())


def test_a_pruned_network_is_evaluated(trained, tmp_path, quiet):
    """As tools/test.py does, to the figure that pruning printed."""
    pytest.importorskip('torch_pruning')
    cfg, checkpoint = trained('classification')
    out = str(tmp_path / 'pruned.pth')
    result = prune_checkpoint(
        Source(cfg, checkpoint), out, PruneOptions(ratio=0.4, calibration=FEW)
    )
    pruned = Config.fromfile(result.config)
    pruned.update(work_dir=str(tmp_path), experiment_name='pruned')
    arguments = dict.fromkeys(('out', 'show', 'show_dir', 'tta'))
    found = launch.test(
        pruned, Namespace(checkpoint=out, quiet=False, **arguments)
    )
    figure = result.stages[-1].figure
    assert found[figure.name] == figure.points
