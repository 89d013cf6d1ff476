"""UniRepLKNet: what the tests of all backbones do not see.

Its outputs are those of the paper's code: test_mm/test_official.py.
"""

import lzma
import re
from pathlib import Path

import pytest
import torch
from helpers import EXACT, deploy, distance, image, randomize
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmpretrain import get_model
from mmpretrain.structures import DataSample
from torch import nn

from mmdbb import LargeKernelConv, reparameterize
from mmdbb.errors import UserError
from mmdbb.mm.backbones import PlainUniRepLKNet, UniRepLKNet
from mmdbb.mm.official.convert import convert_official, load_official_backbone_
from mmdbb.mm.stock.config import stock_config
from mmdbb.reparam import find_blocks

pytestmark = pytest.mark.usefixtures('quiet')

HOME = Path(__file__).resolve().parents[2]
CONFIGS = HOME / 'configs' / 'unireplknet'
OFFICIAL = HOME / 'tests' / 'data' / 'official'
ARCH = dict(channels=(4, 4, 6, 8), kernel_sizes=((3,), (7,), (13, 5), (7,)))


def official_file(folder, kind='train'):
    path = folder / f'{kind}.pth'
    packed = (OFFICIAL / f'unireplknet_{kind}.pth.xz').read_bytes()
    path.write_bytes(lzma.decompress(packed))
    return str(path)


# The architectures, by hand from the paper's code


@pytest.mark.parametrize(
    'name, width, depths, large',
    [
        ('a', 40, (2, 2, 6, 2), range(6)),
        ('f', 48, (2, 2, 6, 2), range(6)),
        ('p', 64, (2, 2, 6, 2), range(6)),
        ('n', 80, (2, 2, 8, 2), range(8)),
        ('t', 80, (3, 3, 18, 3), range(0, 18, 2)),
        ('s', 96, (3, 3, 27, 3), range(0, 27, 3)),
        ('b', 128, (3, 3, 27, 3), range(0, 27, 3)),
        ('l', 192, (3, 3, 27, 3), range(0, 27, 3)),
        ('xl', 256, (3, 3, 27, 3), range(0, 27, 3)),
    ],
)
def test_architectures(name, width, depths, large):
    arch = UniRepLKNet.arch_settings[name]
    assert arch['channels'] == tuple(width * 2**i for i in range(4))
    assert tuple(map(len, arch['kernel_sizes'])) == depths
    first, second, third, last = map(set, arch['kernel_sizes'])
    assert (first, second, last) == ({3}, {13}, {13})
    sizes = arch['kernel_sizes'][2]
    assert [i for i, size in enumerate(sizes) if size == 13] == list(large)
    assert third <= {3, 13}


@pytest.mark.parametrize(
    'error, arguments, message',
    [
        (ValueError, dict(arch='z'), "arch must be one of .*'xl'.*got 'z'"),
        (TypeError, dict(arch=3), 'arch must be .* or a dict .*got 3'),
        (TypeError, dict(arch=dict(channels=(1,))), "keys .*'kernel_sizes'"),
        (
            ValueError,
            dict(arch=dict(ARCH, kernel_sizes=((3,), (4,), (3,), (3,)))),
            'four lists of odd numbers',
        ),
        (ValueError, dict(arch=dict(ARCH, channels=(4, 8))), 'channels must'),
        (ValueError, dict(frozen_stages=5), 'one of -1 to 4, got 5'),
        (ValueError, dict(out_indices=(4,)), 'out_indices must be some of 0'),
    ],
    ids=str,
)
def test_what_is_no_architecture(error, arguments, message):
    with pytest.raises(error, match=message):
        PlainUniRepLKNet(**dict(dict(arch=ARCH), **arguments))


def test_which_kernels_are_blocks_and_the_norm_behind_stays():
    model = UniRepLKNet(ARCH)
    units = [unit for stage in model.stages for unit in stage]
    kinds = [type(unit.dwconv).__name__ for unit in units]
    block = 'DilatedReparamConv'
    assert kinds == ['Conv2d', block, block, 'Conv2d', block]
    assert all(isinstance(unit.norm, nn.BatchNorm2d) for unit in units)
    other = UniRepLKNet(ARCH, block=dict(type='LargeKernelConv'))
    found = list(find_blocks(other).values())
    assert [type(b) for b in found] == [LargeKernelConv] * 3
    # A block for small kernels leaves the large ones plain.
    assert len(find_blocks(UniRepLKNet(ARCH, block=dict(type='DBB')))) == 2


def test_weights_start_as_in_the_papers_code():
    """Deviation 0.02, in blocks too; at first units do next to nothing."""
    torch.manual_seed(0)
    model = UniRepLKNet(dict(ARCH, channels=(16, 16, 32, 32)))
    model.init_weights()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight
            bound = 0.02 * (1 + 4 / weight.numel() ** 0.5)
            assert weight.std() < bound, name
            if weight.numel() > 500:
                assert weight.std() > 0.017, name
            assert module.bias is None or not module.bias.any(), name
    gammas = {
        g.item()
        for n, p in model.named_parameters()
        for g in p.unique()
        if n.endswith('.gamma') and p.dim() == 1
    }
    assert gammas == {torch.tensor(1e-6).item()}
    assert 'stages.0.0.gamma' not in dict(
        UniRepLKNet(ARCH, layer_scale_init_value=0).named_parameters()
    )


def test_drop_path_grows_from_unit_to_unit():
    model = PlainUniRepLKNet(ARCH, drop_path_rate=0.4)
    rates = [
        getattr(unit.drop_path, 'drop_prob', 0.0)
        for stage in model.stages
        for unit in stage
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_outputs_with_and_without_pooling():
    pooled = randomize(UniRepLKNet(ARCH).double()).eval()
    maps = UniRepLKNet(
        ARCH, out_indices=(0, 3), gap_before_final_norm=False
    ).double()
    maps.load_state_dict(pooled.state_dict(), strict=False)
    x = image(2, 3, 96, 64)
    first, last = maps.eval()(x)
    assert first.shape == (2, 4, 24, 16) and last.shape == (2, 8, 3, 2)
    (found,) = pooled(x)
    y = x
    for down, stage in zip(pooled.downsample_layers, pooled.stages):
        y = stage(down(y))
    y = y.mean((2, 3))
    norm = pooled.norm3
    y = (y - y.mean(1, keepdim=True)) / (
        y.var(1, keepdim=True, unbiased=False) + 1e-6
    ).sqrt()
    assert distance(found, y * norm.weight + norm.bias) < EXACT


def test_checkpointing_changes_nothing():
    one = randomize(UniRepLKNet(ARCH).double()).train()
    two = UniRepLKNet(ARCH, with_cp=True).double().train()
    two.load_state_dict(one.state_dict())
    for model in (one, two):
        x = image(2, 3, 64, 96).requires_grad_()
        model(x)[0].sum().backward()
    grads = [dict(m.named_parameters()) for m in (one, two)]
    scale = max(p.grad.abs().max() for p in one.parameters())
    for name, p in grads[0].items():
        error = (p.grad - grads[1][name].grad).abs().max()
        assert error <= EXACT * scale, name
    inside = dict(two.named_buffers())
    for name, value in one.named_buffers():
        if '.branches.' in name:  # the host's norms see a batch twice
            assert distance(inside[name], value) < EXACT, name


# In other networks


def test_a_converted_classifier_merges(tmp_path):
    """The file of the paper's code, its blocks, the plain network."""
    result = convert_official(official_file(tmp_path), str(tmp_path / 'a.pth'))
    cfg = Config.fromfile(result.config)
    merged = deploy(
        cfg, result.checkpoint, str(tmp_path / 'b.pth'), image_size=(64, 48)
    )
    plain = Config.fromfile(merged.config)
    assert plain.model.backbone.type == 'mmpretrain.PlainUniRepLKNet'
    assert 'neck' not in plain.model
    x = image(2, 3, 64, 48, dtype=torch.float32)
    found = [
        get_model(config, pretrained=weights).eval()(x)
        for config, weights in (
            (cfg, result.checkpoint),
            (plain, merged.checkpoint),
        )
    ]
    assert distance(found[1], found[0]) < 1e-5


@pytest.mark.parametrize('kind', ['train', 'deploy'])
def test_the_official_file_starts_a_detectors_backbone(kind, tmp_path):
    """Its norms of the outputs start anew, as in the paper's code."""
    path = official_file(tmp_path, kind)
    cls = UniRepLKNet if kind == 'train' else PlainUniRepLKNet
    maps = cls(ARCH, out_indices=(0, 1, 2, 3), gap_before_final_norm=False)
    pooled = cls(ARCH)
    for model in (maps, pooled):
        load_official_backbone_(model, path)
    x = image(2, 3, 64, 96, dtype=torch.float32)
    (expected,) = pooled.eval()(x)
    for i in range(4):
        norm = getattr(maps, f'norm{i}')
        assert (norm.weight == 1).all() and not norm.bias.any()
    last = maps.eval()(x)[-1]
    assert last.shape[1:] == (8, 2, 3) and expected.shape == (2, 8)
    inner = {n: v for n, v in maps.state_dict().items() if n[:4] != 'norm'}
    theirs = pooled.state_dict()
    assert all(torch.equal(theirs[name], v) for name, v in inner.items())
    other = PlainUniRepLKNet(ARCH) if kind == 'train' else UniRepLKNet(ARCH)
    with pytest.raises(UserError, match='fits a backbone such as mmpretrain'):
        load_official_backbone_(other, path)


def theirs(name, layers=12):
    """``get_layer_id`` of the paper's code for detectors, in its words."""
    if name.startswith('backbone.downsample_layers'):
        return {0: 0, 1: 2, 2: 3, 3: layers}[int(name.split('.')[2])]
    if name.startswith('backbone.stages'):
        stage, block = map(int, name.split('.')[2:4])
        return {0: 1, 1: 2, 2: 3 + block // 3, 3: layers}[stage]
    return layers + 1


def test_rates_decay_as_in_the_papers_code():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = UniRepLKNet('t', base_channels=8)
            self.head = nn.Conv2d(4, 4, 3)

    config = Config.fromfile(CONFIGS / 'unireplknet-t_dilated_cascade_coco.py')
    model = Detector()
    groups = build_optim_wrapper(model, config.optim_wrapper)
    groups = groups.optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in groups:
        for parameter in group['params']:
            name = names[id(parameter)]
            rate = 1e-4 * 0.8 ** (14 - theirs(name) - 1)
            assert group['lr'] == pytest.approx(rate, rel=1e-12), name
            spared = parameter.dim() == 1 or name.endswith('.bias')
            assert group['weight_decay'] == (0 if spared else 0.05), name
            seen.add(name)
    assert seen == set(names.values())
    assert len(groups) < 2 * 14 + 1
    # The factors of response norms have four dimensions, so they decay.
    assert model.backbone.stages[0][0].act[1].gamma.dim() == 4


@pytest.mark.parametrize(
    'rules, message',
    [
        (dict(), r'dict\(decay_rate=...\).*got {}'),
        (dict(decay_rate=2), 'at most 1, got'),
        (dict(decay_rate=0.8, num_layers=12), 'num_layers'),
    ],
)
def test_other_rules_are_refused(rules, message):
    wrapper = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        paramwise_cfg=rules,
        optimizer=dict(type='AdamW', lr=1e-4),
    )
    model = nn.ModuleDict(dict(backbone=PlainUniRepLKNet(ARCH)))
    with pytest.raises(UserError, match=message):
        build_optim_wrapper(model, wrapper)
    wrapper['paramwise_cfg'] = dict(decay_rate=0.5)
    with pytest.raises(UserError, match='get_layer_depth, got Linear with No'):
        build_optim_wrapper(nn.Linear(1, 1), wrapper)


# The configs: numbers of Image/README.md and detection/configs of the code


@pytest.mark.parametrize(
    'name, drop, mixup, cutmix, batch, processes',
    [
        ('n', 0.1, 0.5, 0.5, 128, 4),
        ('t', 0.2, 0.8, 1.0, 128, 4),
        ('s', 0.4, 0.8, 1.0, 64, 8),
    ],
)
def test_imagenet_is_the_papers(name, drop, mixup, cutmix, batch, processes):
    config = Config.fromfile(
        CONFIGS / f'unireplknet-{name}_dilated_imagenet.py'
    )
    backbone, augments = config.model.backbone, config.model.train_cfg.augments
    assert (backbone.arch, backbone.drop_path_rate) == (name, drop)
    assert [a.alpha for a in augments] == [mixup, cutmix]
    wrapper = config.optim_wrapper
    images = config.train_dataloader.batch_size * wrapper.accumulative_counts
    assert images == batch * 8 and images * processes == 4096
    assert wrapper.optimizer.type == 'AdamW' and wrapper.optimizer.lr == 4e-3
    assert wrapper.optimizer.weight_decay == 0.05 and not wrapper.clip_grad
    warm, cosine = config.param_scheduler
    assert (warm.end, cosine.begin, cosine.eta_min) == (20, 20, 1e-6)
    assert config.train_cfg.max_epochs == 300
    assert config.model.head.loss.label_smooth_val == 0.1
    assert not config.get('custom_hooks')
    if name != 'n':
        return
    # As optim_factory.py: what has one dimension, and biases, do not decay.
    config.model.backbone.base_channels = 8
    config.model.head.in_channels = 64
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
        groups = build_optim_wrapper(model, wrapper)
    groups = groups.optimizer.param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for parameter in group['params']:
            name = names[id(parameter)]
            spared = parameter.dim() == 1 or name.endswith('.bias')
            assert group['weight_decay'] == (0 if spared else 0.05), name


def test_the_baseline_differs_in_the_backbone_only():
    plain, other = (
        Config.fromfile(CONFIGS / f'unireplknet-t_{block}_imagenet.py')
        for block in ('plain', 'dilated')
    )
    assert plain.model.backbone.type == 'mmpretrain.PlainUniRepLKNet'
    plain.model.backbone.type = other.model.backbone.type
    assert plain.to_dict() == other.to_dict()


@pytest.mark.parametrize('name, drop', [('t', 0.3), ('s', 0.5)])
def test_coco_is_the_papers(name, drop):
    path = CONFIGS / f'unireplknet-{name}_dilated_cascade_coco.py'
    config = Config.fromfile(path)
    backbone = config.model.backbone
    assert (backbone.arch, backbone.drop_path_rate) == (name, drop)
    assert backbone.with_cp and backbone.norm_cfg.type == 'SyncBN'
    assert re.search(f'unireplknet_{name}_in1k', backbone.init_cfg.checkpoint)
    channels = UniRepLKNet.arch_settings[name]['channels']
    assert tuple(config.model.neck.in_channels) == channels
    assert config.train_dataloader.batch_size == 2
    warm, steps = config.param_scheduler
    assert warm.end == 500 and steps.milestones == [27, 33]
    assert config.train_cfg.max_epochs == 36
    assert config.optim_wrapper.type == 'OptimWrapper'
    heads = config.model.roi_head.bbox_head
    assert [h.type for h in heads] == ['ConvFCBBoxHead'] * 3
    assert [h.loss_bbox.type for h in heads] == ['GIoULoss'] * 3


@pytest.mark.parametrize('name', ['n_dilated', 't_plain'])
def test_imagenet_trains_and_merges(name):
    config = Config.fromfile(CONFIGS / f'unireplknet-{name}_imagenet.py')
    model = config.model
    model.data_preprocessor = config.data_preprocessor
    model.backbone.update(base_channels=8)
    model.head.in_channels = 64
    config.optim_wrapper.accumulative_counts = 1
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(model)
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
    model.init_weights()
    before = {n: p.clone() for n, p in model.named_parameters()}
    batch = dict(
        inputs=[torch.randint(256, (3, 64, 96)).byte() for _ in range(2)],
        data_samples=[
            DataSample().set_gt_label(torch.tensor(i)) for i in range(2)
        ],
    )
    losses = model.train().train_step(batch, wrapper)
    assert torch.isfinite(losses['loss'])
    moved = [
        not torch.equal(p, before[n]) for n, p in model.named_parameters()
    ]
    assert sum(moved) > len(moved) // 2
    model = randomize(model.double()).eval()
    x = image(1, 3, 64, 96)
    expected = model(x)
    assert bool(find_blocks(model)) == (name == 'n_dilated')
    if name == 'n_dilated':
        assert len(find_blocks(model)) == 12
        assert distance(reparameterize(model)(x), expected) < EXACT


def test_coco_builds_and_merges():
    path = CONFIGS / 'unireplknet-t_dilated_cascade_coco.py'
    config = Config.fromfile(path)
    model = config.model
    model.backbone.update(base_channels=8, init_cfg=None)
    model.neck.in_channels = [8, 16, 32, 64]
    with DefaultScope.overwrite_default_scope('mmdet'):
        parts = [MODELS.build(model[name]) for name in ('backbone', 'neck')]
        stock = stock_config(config).model.backbone
    model = revert_sync_batchnorm(nn.Sequential(*parts))
    model = randomize(model.double()).eval()
    x = image(1, 3, 64, 96)
    expected = model(x)
    sides = [tuple(y.shape[2:]) for y in expected]
    assert sides == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    for y, z in zip(reparameterize(model)(x), expected):
        assert distance(y, z) < EXACT
    assert stock.type == 'mmpretrain.PlainUniRepLKNet'
    assert 'block' not in stock and stock.arch == 't'
