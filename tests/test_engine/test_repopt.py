"""RepOptimizer from configs: search, file of scales, training."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import EXACT, distance, run_tool
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from networks import CONFIGS
from runs import run_config, train
from torch import nn

from mmdbb import reparameterize
from mmdbb.deploy import build_model, stock_config
from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks
from mmdbb.repopt import branch_scales, load_scales, save_scales

pytestmark = pytest.mark.usefixtures('quiet')
SGD = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.01),
)


def plain_config(folder, **changes):
    """A run of the stock classifier."""
    cfg = run_config(folder, scores=[1.0], **changes)
    stock = stock_config(Config.fromstring(CONFIGS['classifier'], '.py'))
    cfg.model = stock.model
    cfg.model.backbone.zero_init_residual = False
    cfg.custom_imports = dict(imports=['mmdbb'], allow_failed_imports=False)
    return cfg


def search_config(folder, **changes):
    cfg = plain_config(folder, **changes)
    cfg.model.backbone.conv_cfg = dict(type='LinearAdd')
    return cfg


def target_config(folder, scales, **changes):
    cfg = plain_config(folder, **changes)
    cfg.model.init_cfg = dict(type='RepOpt', scales=str(scales))
    cfg.optim_wrapper = dict(
        constructor='RepOptimWrapperConstructor',
        paramwise_cfg=dict(scales=str(scales), norm_decay_mult=0.0),
        **SGD,
    )
    return cfg


@pytest.fixture(scope='module')
def searched(tmp_path_factory):
    """A search of one epoch: its config, checkpoint and file of scales."""
    folder = tmp_path_factory.mktemp('search')
    cfg = search_config(folder / 'run')
    path = folder / 'search.py'
    cfg.dump(path)
    train(cfg)
    checkpoint = folder / 'run/epoch_1.pth'
    out = folder / 'scales.pth'
    assert run_tool('repopt', path, checkpoint, out) == 0
    return path, checkpoint, out


def test_the_search_trains_scales(searched):
    path, checkpoint, out = searched
    scales = load_scales(out)
    # mmengine swaps the two: these are the averaged weights.
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    assert len(scales) == 8  # two stages of two blocks of two
    own = scales['backbone.layer1.0.conv1'].scales
    assert list(own) == ['identity', 'kxk', '1x1']
    averaged = state['backbone.layer1.0.conv1.generator.scales.kxk']
    assert torch.equal(own['kxk'], averaged)
    assert (own['kxk'] != 1).any()


def test_trained_resumed_and_plain(searched, tmp_path):
    """The start, the steps, a resumed run; the result is the stock network."""
    out = searched[2]
    cfg = target_config(tmp_path / 'a', out)
    cfg.train_cfg.max_epochs = 2
    cfg.val_evaluator.scores = [1.0, 2.0]
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    runner = train(copy.deepcopy(cfg))
    model = runner.model
    assert not find_blocks(model)
    stock = build_model(stock_config(cfg))
    stock.load_state_dict(model.state_dict())
    (group, *_) = runner.optim_wrapper.param_groups
    assert len(group['branch_scales']) == 16
    cfg.load_from, cfg.resume = str(tmp_path / 'a/epoch_1.pth'), True
    cfg.val_evaluator.scores = [2.0]
    assert train(copy.deepcopy(cfg)).epoch == 2
    # Not with other scales.
    scales = load_scales(out)
    scales['backbone.layer1.0.conv1'].scales['kxk'].add_(1)
    save_scales(scales, str(tmp_path / 'other.pth'))
    other = copy.deepcopy(cfg)
    other.optim_wrapper.paramwise_cfg.scales = str(tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='with other scales of branches'):
        train(other)


def test_a_step_is_that_of_the_scaled_branches(searched):
    """Wrapper, paramwise rules and accumulation: as the block's own."""
    torch.manual_seed(0)
    cfg = Config.fromfile(searched[0])
    cfg.model.backbone.conv_cfg.train_scales = False
    search = build_model(cfg).double()
    for name, own in load_scales(searched[2]).items():
        generator = search.get_submodule(name).generator
        for key, value in own.scales.items():
            generator.scales[key].data.copy_(value)
    plain = reparameterize(search)
    wrappers = []
    for model, more in ((search, {}), (plain, dict(scales=searched[2]))):
        rules = dict(norm_decay_mult=0.0, custom_keys={})
        kind = 'RepOptim' if more else 'ReparamOptim'
        wrapper = dict(
            constructor=f'{kind}WrapperConstructor',
            paramwise_cfg=dict(rules, **{k: str(v) for k, v in more.items()}),
            accumulative_counts=2,
            clip_grad=dict(max_norm=1e9),
            **copy.deepcopy(SGD),
        )
        wrappers.append(build_optim_wrapper(model, wrapper))
    for _ in range(4):
        x = torch.randn(2, 3, 24, 32).double()
        for model, wrapper in zip((search, plain), wrappers):
            wrapper.update_params(model.train()(x)[0].var())
    for name in load_scales(searched[2]):
        block = search.get_submodule(name)
        kernel = block.get_equivalent_kernel_bias().kernel
        found = plain.get_submodule(name).weight
        assert distance(found, kernel) < EXACT, name


def test_the_start_comes_after_all_others(searched):
    cfg = target_config(searched[2].parent / 'x', searched[2])
    model, twin = build_model(cfg), None
    name = 'backbone.layer1.0.conv1'
    scales = load_scales(searched[2])[name].scales
    torch.manual_seed(1)
    model.init_weights()
    del cfg.model.init_cfg
    twin = build_model(cfg)
    torch.manual_seed(1)
    twin.init_weights()
    found = model.get_submodule(name).weight
    before = twin.get_submodule(name).weight
    # Off the centre there is the 3x3 kernel alone.
    wide = scales['kxk'].reshape(-1, 1, 1)
    assert distance(found[..., 0, 2], before[..., 0, 2] * wide[..., 0]) < 1e-6
    assert distance(found[..., 1, 1], before[..., 1, 1] * wide[..., 0]) > 0.1
    stem = 'backbone.conv1'
    assert torch.equal(
        model.get_submodule(stem).weight, twin.get_submodule(stem).weight
    )


def wrapper_of(model, **changes):
    cfg = dict(constructor='RepOptimWrapperConstructor', **copy.deepcopy(SGD))
    cfg.update(changes)
    return build_optim_wrapper(model, cfg)


def test_what_is_refused(searched, tmp_path):
    out = str(searched[2])
    model = build_model(plain_config(tmp_path / 'a'))
    rules = dict(scales=out)
    with pytest.raises(ValueError, match=r'needs scales, the path.*got None'):
        wrapper_of(model)
    with pytest.raises(ValueError, match=r'needs scales, the path.*got 5'):
        wrapper_of(model, paramwise_cfg=dict(scales=5))
    with pytest.raises(UserError, match='not found: .*none.pth'):
        wrapper_of(model, paramwise_cfg=dict(scales='none.pth'))
    with pytest.raises(UserError, match='scales are of another network'):
        wrapper_of(nn.Sequential(nn.Conv2d(2, 2, 3)), paramwise_cfg=rules)
    with pytest.raises(UserError, match='for SGD only.*got a AdamW'):
        wrapper_of(
            model,
            paramwise_cfg=rules,
            optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.1),
        )
    with pytest.raises(ValueError, match='unknown rules'):
        wrapper_of(model, paramwise_cfg=dict(rules, foo=1))
    search = build_model(Config.fromfile(searched[0]))
    with pytest.raises(UserError, match='LinearAddConv, which has branches'):
        wrapper_of(search, paramwise_cfg=rules)
    # The start, in the config of a part.
    backbone = target_config(tmp_path / 'b', out)
    backbone.model.backbone.init_cfg = backbone.model.pop('init_cfg')
    with pytest.raises(UserError, match='belongs into the whole model'):
        build_model(backbone).init_weights()


def test_the_stock_config_has_nothing_of_it(searched, tmp_path):
    cfg = stock_config(target_config(tmp_path / 'a', searched[2]))
    assert 'mmdbb' not in str(cfg.get('custom_imports'))
    assert 'RepOpt' not in cfg.pretty_text


def test_the_tool_says_what_is_wrong(searched, tmp_path, capsys):
    path, checkpoint, out = searched
    plain = tmp_path / 'plain.py'
    plain_config(tmp_path / 'a').dump(plain)
    state = build_model(Config.fromfile(plain)).state_dict()
    torch.save(state, tmp_path / 'plain.pth')
    new = tmp_path / 'new.pth'
    for arguments, message in (
        ((path, checkpoint, out), 'output exists'),
        ((plain, tmp_path / 'plain.pth', new), 'no LinearAdd block'),
        ((path, tmp_path / 'plain.pth', new), 'plain.pth'),
        ((path, checkpoint, tmp_path / 'a.txt'), 'must end in .pth or'),
    ):
        assert run_tool('repopt', *arguments) == 2
        assert message in capsys.readouterr().err
    assert not new.exists()
    assert run_tool('repopt', path, checkpoint, out, '--force') == 0
    assert 'scales of 8 convolutions' in capsys.readouterr().out


def test_the_papers_file_of_scales(tmp_path, capsys):
    """Under the names of its code, for the RepVGG of the same widths."""
    config = tmp_path / 'repvgg.py'
    config.write_text(
        "custom_imports = dict(imports=['mmdbb.backbones'])\n"
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='ImageClassifier', backbone=dict(\n"
        "    type='mmpretrain.PlainRepVGG', base_channels=8, arch=dict(\n"
        '        num_blocks=[2, 1, 1, 1], width_factor=[1, 1, 1, 1],\n'
        '        group_layer_map=None, se_cfg=None)))\n'
    )
    channels = {'stage0': 8, 'stage1.0': 8, 'stage1.1': 8, 'stage4.0': 64}
    state = {}
    for unit, count in channels.items():
        for key in ('conv', '1x1', 'identity'):
            if key != 'identity' or unit == 'stage1.1':
                name = f'{unit}.scale_{key}.weight'
                state[name] = torch.rand(count)
    torch.save(dict(model=state), tmp_path / 'theirs.pth')
    out = tmp_path / 'ours.pth'
    assert run_tool('repopt', config, tmp_path / 'theirs.pth', out) == 0
    scales = load_scales(out)
    assert list(scales) == [
        'backbone.stem.branch_reparam',
        'backbone.stage_1.0.branch_reparam',
        'backbone.stage_1.1.branch_reparam',
        'backbone.stage_4.0.branch_reparam',
    ]
    found = scales['backbone.stage_1.1.branch_reparam'].scales
    assert list(found) == ['kxk', '1x1', 'identity']
    assert torch.equal(found['kxk'], state['stage1.1.scale_conv.weight'])
    model = build_model(Config.fromfile(config))
    wrapper_of(model, paramwise_cfg=dict(scales=str(out)))
    state['stage3.7.scale_conv.weight'] = torch.rand(8)
    torch.save(state, tmp_path / 'theirs.pth')
    arguments = (config, tmp_path / 'theirs.pth', out, '--force')
    assert run_tool('repopt', *arguments) == 2
    assert 'it has no backbone.stage_3.7' in capsys.readouterr().err
    state['other'] = torch.rand(8)
    torch.save(state, tmp_path / 'theirs.pth')
    assert run_tool('repopt', *arguments) == 2
    assert 'other are none' in capsys.readouterr().err
    with pytest.raises(ValueError, match='no LinearAdd'):
        branch_scales(model)


# The configs


SEARCHES = ('repvgg-b1', 'repvgg-l1', 'resnet18')
#: By config, the widths for tests.
NARROW = {
    'repvgg-b1': dict(base_channels=4),
    'repvgg-l1': dict(base_channels=4),
    'resnet18': dict(base_channels=4, stem_channels=4),
}


@pytest.mark.parametrize('name', SEARCHES)
def test_configs_of_search_and_training(name, tmp_path):
    root = Path(__file__).resolve().parents[2] / 'configs/repopt'
    search = Config.fromfile(root / f'{name}_search_cifar100.py')
    target = Config.fromfile(root / f'{name}_imagenet.py')
    place = f'work_dirs/{name}_search_cifar100/scales.pth'
    rules = target.optim_wrapper.paramwise_cfg
    assert rules.scales == target.model.init_cfg.scales == place
    for cfg in (search, target):
        cfg.model.backbone.update(NARROW[name])
        width = 32 if name == 'resnet18' else 128
        cfg.model.head.in_channels = width
    model = build_model(search)
    scales = branch_scales(model)
    starts = {
        block: own.scales['kxk'][0].item() for block, own in scales.items()
    }
    optimizer = build_optim_wrapper(model, search.optim_wrapper).optimizer
    decays = {
        id(p): group['weight_decay']
        for group in optimizer.param_groups
        for p in group['params']
    }
    for own, parameter in model.named_parameters():
        whole = parameter.dim() > 1 or 'identity' in own
        assert decays[id(parameter)] == (4e-5 if whole else 0.0), own
    out = str(tmp_path / 'scales.pth')
    save_scales(scales, out)
    rules.scales = target.model.init_cfg.scales = out
    plain = build_model(target)
    convs = {
        n
        for n, m in plain.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    }
    assert scales.keys() == convs
    if name == 'resnet18':
        assert all(
            '1x1_avg' in own.scales and '1x1_kxk' not in own.scales
            for own in scales.values()
        )
    else:
        third = 'backbone.stage_2.3.branch_reparam'
        assert starts[third] == pytest.approx((2 / 3) ** 0.5)
        assert starts['backbone.stage_2.0.branch_reparam'] == 1
        assert starts['backbone.stem.branch_reparam'] == 1
    build_optim_wrapper(plain, target.optim_wrapper)
    plain.init_weights()
