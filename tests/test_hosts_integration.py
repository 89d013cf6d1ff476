"""``conv_cfg=dict(type='DBB')`` in what the three packages themselves build.

Narrow networks, small images: built, trained for a step, merged, equal.
"""

import copy

import pytest
import torch
from helpers import (
    EXACT,
    SINGLE,
    blocks_of,
    distance,
    image,
    randomize,
    tensors,
)
from mmcv.cnn import fuse_conv_bn
from mmengine.model import (
    ExponentialMovingAverage,
    Sequential,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import mmdbb
from mmdbb.blocks import DBB

pytestmark = pytest.mark.usefixtures('quiet')

DBB_CFG = dict(type='DBB')
BN = dict(type='BN')
NARROW = dict(base_channels=8, stem_channels=8)
IMAGE = (2, 3, 32, 48)


def pyramid(channels=8, levels=3):
    """Features such as a neck gives."""
    return [(2, channels, 16 >> i, 24 >> i) for i in range(levels)]


def stages(*channels):
    """Features such as a backbone gives."""
    return [(2, c, 16 >> i, 12 >> i) for i, c in enumerate(channels)]


#: Name -> config without conv_cfg, shape(s) of the input.
COMPONENTS = {
    'mmpretrain.ResNet-18': (dict(depth=18, **NARROW), IMAGE),
    'mmpretrain.ResNet-50': (dict(depth=50, **NARROW), IMAGE),
    'mmpretrain.ResNet-dilated': (
        dict(
            depth=18,
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
            deep_stem=True,
            avg_down=True,
            **NARROW,
        ),
        IMAGE,
    ),
    'mmpretrain.ResNetV1d': (dict(depth=18, **NARROW), IMAGE),
    'mmpretrain.ResNeXt': (
        dict(depth=50, groups=4, width_per_group=4, base_channels=8),
        IMAGE,
    ),
    'mmpretrain.SEResNet': (dict(depth=50, se_ratio=4, **NARROW), IMAGE),
    'mmpretrain.MobileNetV2': (dict(widen_factor=0.1), IMAGE),
    'mmpretrain.ShuffleNetV2': (dict(widen_factor=0.5), IMAGE),
    'mmdet.ResNet-18': (
        dict(depth=18, frozen_stages=1, norm_eval=False, **NARROW),
        IMAGE,
    ),
    'mmdet.ResNet-50': (
        dict(
            depth=50,
            deep_stem=True,
            strides=(1, 2, 2, 1),
            dilations=(1, 1, 1, 2),
            **NARROW,
        ),
        IMAGE,
    ),
    'mmdet.ResNeXt': (
        dict(depth=50, groups=4, base_width=4, **NARROW),
        IMAGE,
    ),
    'mmdet.FPN': (
        dict(in_channels=[4, 8, 16], out_channels=8, num_outs=4),
        stages(4, 8, 16),
    ),
    'mmdet.PAFPN': (
        dict(in_channels=[4, 8, 16], out_channels=8, num_outs=3, norm_cfg=BN),
        stages(4, 8, 16),
    ),
    'mmdet.RetinaHead': (
        dict(num_classes=2, in_channels=8, feat_channels=8, stacked_convs=2),
        pyramid(levels=5),
    ),
    'mmdet.FCOSHead': (
        dict(
            num_classes=2,
            in_channels=8,
            feat_channels=8,
            stacked_convs=2,
            norm_cfg=dict(type='GN', num_groups=2),
        ),
        pyramid(levels=5),
    ),
    'mmdet.Shared4Conv1FCBBoxHead': (
        dict(
            num_classes=2,
            in_channels=8,
            conv_out_channels=8,
            fc_out_channels=8,
            norm_cfg=BN,
        ),
        (3, 8, 7, 7),
    ),
    'mmdet.FCNMaskHead': (
        dict(
            num_classes=2,
            num_convs=2,
            in_channels=8,
            conv_out_channels=8,
            norm_cfg=BN,
        ),
        (3, 8, 7, 7),
    ),
    'mmseg.ResNet': (
        dict(
            depth=18,
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
            contract_dilation=True,
            **NARROW,
        ),
        IMAGE,
    ),
    'mmseg.ResNetV1c': (
        dict(
            depth=50,
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
            multi_grid=(1, 2, 4),
            **NARROW,
        ),
        IMAGE,
    ),
    'mmseg.FCNHead': (
        dict(in_channels=8, channels=8, num_classes=2, in_index=2),
        pyramid(),
    ),
    'mmseg.PSPHead': (
        dict(
            in_channels=8,
            channels=8,
            num_classes=2,
            in_index=0,
            pool_scales=(1, 2, 3),
        ),
        pyramid(),
    ),
    'mmseg.ASPPHead': (
        dict(
            in_channels=8,
            channels=8,
            num_classes=2,
            in_index=0,
            dilations=(1, 2, 4),
        ),
        pyramid(),
    ),
    'mmseg.UPerHead': (
        dict(
            in_channels=[4, 8, 16],
            in_index=[0, 1, 2],
            channels=8,
            num_classes=2,
        ),
        stages(4, 8, 16),
    ),
}


def inputs(shapes, dtype):
    if isinstance(shapes, tuple):
        return image(*shapes, dtype=dtype)
    return tuple(image(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))


def build(name, config, **more):
    kind = name.split('-')[0]
    config = dict(config, type=kind, **more)
    if 'Head' in name and 'mmseg' in name:
        config.setdefault('norm_cfg', BN)
    with DefaultScope.overwrite_default_scope(name.split('.')[0]):
        model = MODELS.build(config)
        model.init_weights()
    return model


def in_mode(model, training):
    """The hosts' ResNets return None from train() and eval()."""
    model.train(training)
    return model


@pytest.mark.parametrize('name', COMPONENTS)
def test_built_trained_merged_equal(name):
    config, shapes = COMPONENTS[name]
    model = build(name, config, conv_cfg=DBB_CFG)
    blocks = blocks_of(model)
    assert blocks and all(type(b) is DBB for b in blocks)

    # One training step.
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    outputs = tensors(model(inputs(shapes, torch.float32)))
    sum(y.square().mean() for y in outputs).backward()
    trained = [p for b in blocks for p in b.parameters() if p.requires_grad]
    assert trained
    for parameter in trained:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    optimizer.step()

    # Merged, equal.
    model = in_mode(randomize(model.double()), False)
    merged = mmdbb.reparameterize(model)
    assert not any(
        type(m).__module__.startswith('mmdbb') for m in merged.modules()
    )
    x = inputs(shapes, torch.float64)
    with torch.no_grad():
        expected, found = tensors(model(x)), tensors(merged(x))
    assert len(expected) == len(found)
    for a, b in zip(found, expected):
        assert distance(a, b) < EXACT


def test_merged_equal_in_float32():
    model = build('mmdet.ResNet', dict(depth=18, **NARROW), conv_cfg=DBB_CFG)
    model = in_mode(randomize(model), False)
    x = image(*IMAGE, dtype=torch.float32)
    pairs = zip(mmdbb.reparameterize(model)(x), model(x))
    for found, expected in pairs:
        # Roundings of 18 layers.
        assert distance(found, expected) < 10 * SINGLE


@pytest.mark.parametrize('preset', ['ACB', 'RepVGGConv'])
@pytest.mark.parametrize(
    'name', ['mmpretrain.ResNet-18', 'mmdet.RetinaHead', 'mmseg.PSPHead']
)
def test_other_blocks(name, preset):
    config, shapes = COMPONENTS[name]
    model = build(name, config, conv_cfg=dict(type=preset))
    model = in_mode(randomize(model.double()), False)
    x = inputs(shapes, torch.float64)
    pairs = zip(tensors(mmdbb.reparameterize(model)(x)), tensors(model(x)))
    for found, expected in pairs:
        assert distance(found, expected) < EXACT


def test_stem_and_1x1_keep_the_stock_names():
    config = dict(depth=50, **NARROW)
    ours = build('mmpretrain.ResNet', config, conv_cfg=DBB_CFG).state_dict()
    stock = build('mmpretrain.ResNet', config).state_dict()
    missing = [name for name in stock if name not in ours]
    assert missing and all('.conv2.' in name for name in missing)
    shapes = {n: v.shape for n, v in ours.items() if n in stock}
    assert all(stock[n].shape == s for n, s in shapes.items())


# Gradient checkpointing of the hosts

WITH_CP = {
    'mmpretrain.ResNet-18': {},
    'mmpretrain.ResNet-50': {},
    'mmdet.ResNet-18': dict(norm_eval=False),
    'mmdet.ResNet-50': dict(norm_eval=False),
    'mmseg.ResNetV1c-18': dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    'mmseg.ResNetV1c-50': {},
}


@pytest.mark.filterwarnings('ignore:.*use_reentrant')
@pytest.mark.parametrize('name', WITH_CP)
def test_with_cp_gives_the_same_gradients(name):
    """In the papers' code they are wrong by up to 39 %."""
    config = dict(
        depth=int(name.split('-')[1]),
        num_stages=2,
        out_indices=(1,),
        conv_cfg=DBB_CFG,
        **NARROW,
        **WITH_CP[name],
    )
    for key in ('strides', 'dilations'):
        config[key] = config.get(key, (1, 2, 1, 1))[:2]
    config['dilations'] = (1, 2)
    plain = in_mode(randomize(build(name, config).double()), True)
    saving = build(name, config, with_cp=True).double()
    saving.train()
    saving.load_state_dict(plain.state_dict())
    assert any(getattr(m, 'with_cp', False) for m in saving.modules())
    x = image(2, 3, 24, 32)
    for _ in range(2):
        results = []
        for model in (plain, saving):
            model.zero_grad()
            y = tensors(model(x))[0]
            (y * image(*y.shape, seed=1)).sum().backward()
            results.append((y, [p.grad for p in model.parameters()]))
        (y, grads), (z, grads_cp) = results
        assert distance(z, y) < EXACT
        largest = max(g.abs().max() for g in grads)
        names = [n for n, _ in plain.named_parameters()]
        for n, a, b in zip(names, grads, grads_cp):
            assert (a - b).abs().max() <= EXACT * largest, n
        # Of the host's own norms the statistics are the host's business.
        for a, b in zip(blocks_of(plain), blocks_of(saving)):
            for p, q in zip(a.buffers(), b.buffers()):
                assert torch.equal(p, q)


# Initialisation

KAIMING = [
    dict(type='Kaiming', layer=['Conv2d']),
    dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
    dict(type='Normal', std=3.0, layer=['BatchNorm2d', 'IdentityConv1x1']),
]
CONV_CFGS = {
    'DBB': dict(type='DBB'),
    'DBB-gamma_init': dict(type='DBB', gamma_init=0.25),
    'DBB-single_init': dict(type='DBB', single_init=True),
    'ACB-reduce_gamma': dict(type='ACB', reduce_gamma=True),
}


def gammas_and_identities(block):
    gammas = [
        b.last_norm.weight.unique().tolist() for b in block.branches.values()
    ]
    identities = [
        m.weight.abs().max().item()
        for n, m in block.named_modules()
        if n.endswith('1x1_kxk.conv1')
    ]
    return gammas, identities


@pytest.mark.parametrize('conv_cfg', CONV_CFGS)
@pytest.mark.parametrize('rules', ['default', 'given'])
@pytest.mark.parametrize(
    'kind', ['mmpretrain.ResNet', 'mmdet.ResNet', 'mmseg.ResNet']
)
def test_blocks_survive_init_weights(kind, rules, conv_cfg):
    config = dict(
        type=kind,
        depth=18,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
        conv_cfg=CONV_CFGS[conv_cfg],
        **NARROW,
    )
    if rules == 'given':
        config['init_cfg'] = copy.deepcopy(KAIMING)
    model = MODELS.build(config)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()

    expected = {
        'DBB': [[1.0]] * 4,
        'DBB-gamma_init': [[0.25]] * 4,
        'DBB-single_init': [[1.0], [0.0], [0.0], [0.0]],
        'ACB-reduce_gamma': [[torch.tensor(1 / 3).item()]] * 3,
    }[conv_cfg]
    blocks = {n: m for n, m in model.named_modules() if m in blocks_of(model)}
    assert len(blocks) == 8
    for block in blocks.values():
        gammas, identities = gammas_and_identities(block)
        assert gammas == expected
        assert identities == ([0.0] if 'DBB' in conv_cfg else [])
    changed = [
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    ]
    # The host's rules are for the host's layers.
    assert 'conv1.weight' in changed
    assert not [
        n for n in changed if any(n.startswith(f'{b}.') for b in blocks)
    ]


def test_blocks_survive_a_whole_model():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(
                    type='ResNet',
                    depth=18,
                    conv_cfg=dict(type='DBB', gamma_init=0.25),
                    **NARROW,
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=3, in_channels=64),
                init_cfg=copy.deepcopy(KAIMING),
            )
        )
        model.init_weights()
    for block in blocks_of(model):
        gammas, identities = gammas_and_identities(block)
        assert gammas == [[0.25]] * 4 and identities == [0.0]


def test_own_init_cfg_applies_where_the_host_passes_it_on():
    rule = dict(type='Constant', val=0.5, layer='BatchNorm2d')
    model = Sequential(
        DBB(4, 4, 3, init_cfg=rule),
        DBB(4, 4, 3),
        init_cfg=copy.deepcopy(KAIMING),
    )
    model.init_weights()
    gammas, identities = gammas_and_identities(model[0])
    assert gammas == [[0.5]] * 4 and identities == [0.0]
    gammas, identities = gammas_and_identities(model[1])
    assert gammas == [[1.0]] * 4 and identities == [0.0]


def test_freezing_reaches_the_norms_inside():
    model = build(
        'mmdet.ResNet',
        dict(depth=18, frozen_stages=2, norm_eval=True, **NARROW),
        conv_cfg=DBB_CFG,
    )
    model.train()
    frozen = [
        b for n in (1, 2) for b in blocks_of(getattr(model, f'layer{n}'))
    ]
    assert len(frozen) == 8
    for block in frozen:
        assert not any(p.requires_grad for p in block.parameters())
    before = copy.deepcopy(dict(model.named_buffers()))
    model(image(*IMAGE, dtype=torch.float32))
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


# What hosts do to their norms and weights


@pytest.mark.parametrize(
    'convert',
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        convert_sync_batchnorm,
        lambda m: revert_sync_batchnorm(convert_sync_batchnorm(m)),
    ],
    ids=['torch', 'mmengine', 'reverted'],
)
def test_converted_norms_still_merge(convert):
    config = dict(depth=18, num_stages=2, out_indices=(1,), **NARROW)
    config.update(strides=(1, 2), dilations=(1, 1))
    model = build('mmpretrain.ResNet', config, conv_cfg=DBB_CFG)
    model = in_mode(randomize(model.double()), False)
    x = image(*IMAGE)
    expected = tensors(model(x))[0]
    converted = in_mode(convert(copy.deepcopy(model)).double(), False)
    found = tensors(mmdbb.reparameterize(converted)(x))[0]
    assert distance(found, expected) < EXACT


def test_averaged_weights_still_merge():
    model = nn.Sequential(DBB(3, 8, 3, padding=1), DBB(8, 8, 3)).double()
    average = ExponentialMovingAverage(model, 0.1, update_buffers=True)
    for seed in range(2):
        average.update_parameters(randomize(model, seed))
    average.eval()
    x = image(2, 3, 6, 7)
    merged = mmdbb.reparameterize(average)
    assert distance(merged(x), average(x)) < EXACT


@pytest.mark.parametrize('name', COMPONENTS)
def test_fusing_norms_before_merging_changes_nothing(name):
    """What the hosts' loading does, on networks that are not merged."""
    config, shapes = COMPONENTS[name]
    model = build(name, config, conv_cfg=DBB_CFG)
    model = in_mode(randomize(model.double()), False)
    x = inputs(shapes, torch.float64)
    expected = tensors(model(x))
    fused = fuse_conv_bn(copy.deepcopy(model))
    for a, b in zip(tensors(fused(x)), expected):
        assert distance(a, b) < EXACT
    merged = mmdbb.reparameterize(fused)
    for a, b in zip(tensors(merged(x)), expected):
        assert distance(a, b) < EXACT


def test_wrong_fusion_in_a_host_is_refused():
    """The bottleneck's 1x1 without a norm, then a block with one."""
    from mmdet.utils import benchmark  # a host that fuses what it loads

    model = build(
        'mmdet.ResNet',
        dict(depth=50, num_stages=1, strides=(1,), dilations=(1,), **NARROW),
        conv_cfg=DBB_CFG,
        out_indices=(0,),
    )
    model.layer1[1].bn1 = nn.Identity()
    model = in_mode(randomize(model.double()), False)
    expected = model(image(*IMAGE))[0]
    with pytest.raises(ValueError, match="'bn2' of a Bottleneck into 'conv1'"):
        benchmark.fuse_conv_bn(copy.deepcopy(model))
    merged = benchmark.fuse_conv_bn(mmdbb.reparameterize(model))
    assert distance(merged(image(*IMAGE))[0], expected) < EXACT
