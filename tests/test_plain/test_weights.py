"""Blocks that start from plain weights compute what the plain network does."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import EXACT, SINGLE, blocks_of, distance, image, randomize
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from registered import each_block, starts_plain, sums_branches, sums_several
from torch import nn

import mmdbb.backbones  # noqa: F401
from mmdbb import DBB, load_plain_weights_
from mmdbb.blocks import OREPAConv, OREPARepVGG
from mmdbb.errors import UserError
from mmdbb.mm.stock.config import stock_config
from mmdbb.plain.blocks import copy_entries_, plain_start
from mmdbb.plain.branch_sums import NormValues
from mmdbb.reparam import literal_forward
from mmdbb.stock_weights import stock_state
from mmdbb.transforms import KernelBias

SUMS = each_block(starts_plain, sums_branches, argument='block_type')
GEOMETRIES = (
    dict(in_channels=6, out_channels=8, kernel_size=3, padding=1),
    dict(in_channels=6, out_channels=6, kernel_size=3, padding=1, groups=3),
    dict(in_channels=6, out_channels=6, kernel_size=3, padding=1, groups=6),
    dict(in_channels=6, out_channels=4, kernel_size=3, stride=2, padding=2)
    | dict(dilation=2),
    dict(in_channels=6, out_channels=6, kernel_size=5, padding=1),
    dict(in_channels=6, out_channels=4, kernel_size=(2, 3)),
)
POINTWISE = (
    dict(in_channels=6, out_channels=8, kernel_size=1, stride=2),
    dict(in_channels=6, out_channels=4, kernel_size=1, groups=2),
)
CASES = ('no norm', 'kept', 'absorbed')


def plain_pair(geometry, bias=False, seed=0):
    """A convolution and a norm whose statistics are those of its output."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(**geometry, bias=bias).double()
    norm = nn.BatchNorm2d(conv.out_channels, eps=1e-3, momentum=None).double()
    randomize(norm, seed)
    norm.reset_running_stats()
    norm(conv(image(8, 6, 9, 8, seed=seed)))
    norm.momentum = 0.1
    with torch.no_grad():
        # Switched off, nearly switched off, and negative.
        norm.weight[:3] = torch.tensor([0.0, 1e-12, -0.7])
    return conv, norm


def start(block, conv, norm=None, absorbed=False, **kwargs):
    bias = conv.bias
    if bias is None:
        bias = conv.weight.new_zeros(conv.out_channels)
    values = None if norm is None else NormValues.of(norm)
    plain = KernelBias(conv.weight, bias)
    copy_entries_(block, plain_start(block, plain, values, absorbed, **kwargs))
    return block


def started_block(block_type, geometry, case, bias=False, **kwargs):
    conv, norm = plain_pair(geometry, bias)
    scale = kwargs.pop('branch_scale', 0.1)
    wants_bias = bias or case == 'absorbed'
    block = block_type(**geometry, bias=wants_bias, **kwargs).double()
    given = None if case == 'no norm' else norm
    start(block, conv, given, case == 'absorbed', branch_scale=scale)
    plain = nn.Sequential(conv, norm) if case == 'absorbed' else conv
    return block, plain, norm


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
@SUMS
def test_block_is_the_plain_convolution(block_type, geometry, case, bias):
    block, plain, _ = started_block(block_type, geometry, case, bias)
    block.eval(), plain.eval()
    x = image(2, 6, 9, 7, seed=1)
    assert distance(block.forward_branches(x), plain(x)) < EXACT
    assert distance(block(x), plain(x)) < EXACT
    assert distance(block.to_conv()(x), plain(x)) < EXACT


@pytest.mark.parametrize('case', CASES)
def test_block_is_the_plain_convolution_in_single_precision(case):
    block, plain, _ = started_block(DBB, GEOMETRIES[0], case)
    conv, norm = plain_pair(GEOMETRIES[0])
    single = DBB(**GEOMETRIES[0], bias=case == 'absorbed')
    start(
        single,
        conv.float(),
        None if case == 'no norm' else norm.float(),
        case == 'absorbed',
    )
    single.eval(), plain.eval()
    x = image(2, 6, 9, 7)
    found = single.forward_branches(x.float())
    assert distance(found, plain(x)) < SINGLE


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_norms_without_gamma(case, bias):
    block, plain, _ = started_block(
        DBB, GEOMETRIES[0], case, bias, norm_cfg=dict(type='BN', affine=False)
    )
    block.eval(), plain.eval()
    x = image(2, 6, 9, 7)
    assert distance(block.forward_branches(x), plain(x)) < EXACT


@pytest.mark.parametrize('affine', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_trained_blocks_start_anew(case, affine):
    block, plain, norm = started_block(
        DBB,
        GEOMETRIES[0],
        case,
        bias=True,
        norm_cfg=dict(type='BN', affine=affine),
    )
    randomize(block)
    if block.own_bias is not None:
        nn.init.constant_(block.own_bias, 3.0)
    conv = plain[0] if case == 'absorbed' else plain
    given = None if case == 'no norm' else norm
    start(block, conv, given, case == 'absorbed')
    block.eval(), plain.eval()
    x = image(2, 6, 9, 7)
    assert distance(block.forward_branches(x), plain(x)) < EXACT


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('geometry', GEOMETRIES[:3], ids=str)
@each_block(starts_plain, sums_several, argument='block_type')
def test_every_branch_is_alive(block_type, geometry, case):
    block, _, _ = started_block(block_type, geometry, case)
    block.train()
    y = block.forward_branches(image(2, 6, 9, 7))
    F.mse_loss(y, torch.randn_like(y)).backward()
    assert len(block.branches) > 1
    for name, branch in block.branches.items():
        assert (branch.last_norm.weight != 0).all(), name
        for parameter, value in branch.named_parameters():
            if 'norm1' in parameter:  # the norm behind it undoes a shift
                continue
            if parameter.endswith('.prior'):  # after its scale, see below
                continue
            assert value.grad.abs().max() > 1e-7, f'{name}.{parameter}'


@pytest.mark.parametrize('case', ['kept', 'absorbed'])
@SUMS
def test_training_starts_near_the_plain_network(block_type, case):
    x = image(8, 6, 9, 8)
    errors = []
    for scale in (1e-1, 1e-3, 1e-5):
        block, plain, norm = started_block(
            block_type, GEOMETRIES[0], case, branch_scale=scale
        )
        if case == 'kept':
            plain = nn.Sequential(plain, norm)
            block = nn.Sequential(block, copy.deepcopy(norm))
        found, expected = block.train()(x), plain.train()(x)
        errors.append(distance(found, expected))
        if case == 'kept':  # what the norm behind the block will learn
            for name in ('running_mean', 'running_var'):
                ours, theirs = getattr(block[1], name), getattr(norm, name)
                # Running variances are unbiased, by 1 / 576 here; momentum 0.1
                assert distance(ours, theirs) < 3 * scale + 2e-4
    assert errors[0] < 0.3
    # A channel that was off is on by a thousandth.
    assert errors[1] < 6e-3 and errors[2] < 4e-3


def test_branches_start_on_the_positive_side():
    """A share of the plain gamma's size, whatever that gamma's sign."""
    block, _, norm = started_block(
        DBB, GEOMETRIES[0], 'absorbed', branch_scale=0.25
    )
    assert (norm.weight < -0.01).any() and (norm.weight > 0.01).any()
    expected = 0.25 * block.branches['kxk'].norm.weight.abs()
    for name in ('1x1', '1x1_avg', '1x1_kxk'):
        assert torch.equal(block.branches[name].last_norm.weight, expected)


def test_carries_the_norm_over():
    block, _, norm = started_block(DBB, GEOMETRIES[0], 'absorbed')
    own = block.branches['kxk'].norm
    for name in ('running_mean', 'running_var', 'num_batches_tracked'):
        assert torch.equal(getattr(own, name), getattr(norm, name))
    assert torch.equal(own.weight[2:], norm.weight[2:])


@pytest.mark.parametrize('case', ['kept', 'absorbed'])
def test_statistics_are_those_of_a_convolution_without_bias(case):
    block, plain, norm = started_block(DBB, GEOMETRIES[0], case, bias=True)
    conv = plain[0] if case == 'absorbed' else plain
    found = block.branches['kxk'].norm.running_mean
    assert distance(found, norm.running_mean - conv.bias) < EXACT
    assert conv.bias.abs().min() > 1e-3


@pytest.mark.parametrize(
    ('block', 'kwargs', 'message'),
    [
        (DBB(6, 8, 3, branches=['1x1', '1x1_avg']), {}, "no 'kxk' branch"),
        (OREPAConv(6, 8, 7), {}, 'a plain 7x7 kernel; .*max_kernel_size'),
        (OREPAConv(6, 8, 3, bias=False), {}, 'has a bias, the block none'),
        (DBB(6, 8, 3, sum_norm=True), {}, 'a norm after its sum cannot'),
        (DBB(6, 8, 3, deploy=True), {}, 'merged already'),
        (DBB(6, 9, 3), {}, r'needs \(9, 6, 3, 3\)'),
        (nn.Conv2d(6, 8, 3), {}, 'has neither branches nor a composed'),
        (DBB(6, 8, 3), dict(branch_scale=0), 'greater than 0'),
    ],
)
def test_refuses_blocks_that_cannot_start(block, kwargs, message):
    with pytest.raises(ValueError, match=message):
        start(block, nn.Conv2d(6, 8, block.kernel_size), **kwargs)


# ---------------------------------------------------------- composed kernels


@pytest.mark.parametrize('trained', [False, True])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('geometry', GEOMETRIES + POINTWISE, ids=str)
def test_composed_kernel_is_the_plain_one(geometry, case, trained):
    conv, norm = plain_pair(geometry, bias=True)
    block = OREPAConv(**geometry).double()
    if trained:
        randomize(block)
    given = None if case == 'no norm' else norm
    start(block, conv, given, case == 'absorbed')
    norm.eval()
    plain = nn.Sequential(conv, norm) if case == 'absorbed' else conv
    x = image(2, 6, 9, 7, seed=1)
    for training in (False, True):  # it has no norms: in both
        block.train(training)
        assert distance(block.forward_branches(x), plain(x)) < EXACT
        assert distance(block(x), plain(x)) < EXACT
    assert distance(block.to_conv()(x), plain(x)) < EXACT


@pytest.mark.parametrize('scale', [0.1, 0.5])
@pytest.mark.parametrize('geometry', GEOMETRIES + POINTWISE, ids=str)
def test_composed_kernel_starts_with_a_share_of_the_others(geometry, scale):
    conv, _ = plain_pair(geometry)
    with torch.no_grad():
        conv.weight[1] = 0
    usual = OREPAConv(**geometry, bias=False).double().generator
    block = OREPAConv(**geometry, bias=False).double()
    block.generator.load_state_dict(usual.state_dict())
    start(block, conv, branch_scale=scale)
    generator = block.generator
    y = block.train()(image(2, 6, 9, 7))
    F.mse_loss(y, torch.randn_like(y)).backward()
    for name, value in generator.named_parameters():
        # Its scale starts at 0, as in the paper's code, and learns first.
        assert value.grad.abs().max() > 1e-7 or name == 'prior', name
    with torch.no_grad():
        assert torch.equal(generator.scale[0], torch.ones(8)[: len(y[0])])
        others = usual.scale[1:, 0] != 0
        ratio = (generator.scale[1:] / usual.scale[1:])[others]
        assert distance(ratio, ratio[:1].expand_as(ratio)) < EXACT
        assert (generator.scale[1:][~others] == 0).all()
        generator.scale[0] = 0
        sizes = [k.flatten(1).norm(dim=1) for k in (generator(), conv.weight)]
    # A channel that was off counts as a thousandth of the mean.
    sizes[1][1] = 1e-3 * sizes[1].mean()
    assert distance(sizes[0], scale * sizes[1]) < EXACT
    assert (sizes[0] > 0).all()


def test_composed_kernel_starts_from_zeros():
    conv = nn.Conv2d(6, 8, 3, bias=False)
    nn.init.zeros_(conv.weight)
    block = start(OREPAConv(6, 8, 3, bias=False), conv)
    assert block.generator.scale[3].abs().min() > 0.01
    assert block.to_conv().weight.abs().max() < 1e-7


@pytest.mark.parametrize('block_type', [OREPAConv, OREPARepVGG])
def test_composed_kernel_in_single_precision(block_type):
    conv, norm = plain_pair(GEOMETRIES[0])
    block = block_type(**GEOMETRIES[0], bias=False)
    start(block, conv.float(), norm.float())
    x = image(2, 6, 9, 7).float()
    assert distance(block.eval()(x), conv(x)) < SINGLE


@pytest.mark.parametrize('name', ['running_var', 'weight'])
def test_refuses_values_that_are_not_finite(name):
    conv, norm = plain_pair(GEOMETRIES[0])
    with torch.no_grad():
        getattr(norm, name)[1] = -5.0 if name == 'running_var' else torch.inf
    with pytest.raises(ValueError, match='not be finite'):
        start(DBB(**GEOMETRIES[0]), conv, norm, absorbed=True)


# ------------------------------------------------------------------ networks

SMALL = dict(base_channels=4, stem_channels=8)
RESNET = dict(type='mmpretrain.ResNet', depth=18, **SMALL)
BACKBONES = {
    # what starts: the plain network it starts as
    'absorbed': (
        dict(type='mmpretrain.ResNetDBB', depth=18, **SMALL),
        RESNET,
    ),
    'absorbed ACB': (
        dict(type='mmpretrain.ResNetDBB', depth=50, **SMALL)
        | dict(block=dict(type='ACB')),
        dict(type='mmpretrain.ResNet', depth=50, **SMALL),
    ),
    'zero_init_residual': (
        dict(type='mmpretrain.ResNetDBB', depth=18, **SMALL)
        | dict(zero_init_residual=True),
        RESNET,
    ),
    'deep stem': (
        dict(type='mmpretrain.ResNetV1cDBB', depth=18, **SMALL),
        dict(type='mmpretrain.ResNetV1c', depth=18, **SMALL),
    ),
    'deep stem, names of mmseg': (
        dict(type='mmpretrain.ResNetV1cDBB', depth=18, **SMALL),
        dict(type='mmseg.ResNetV1c', depth=18, **SMALL),
    ),
    'names of mmpretrain in mmseg': (
        dict(type='mmseg.ResNetV1c', depth=18, **SMALL)
        | dict(conv_cfg=dict(type='DBB')),
        dict(type='mmpretrain.ResNetV1c', depth=18, **SMALL),
    ),
    'pooled shortcuts': (
        dict(type='mmpretrain.ResNetV1dDBB', depth=18, **SMALL),
        dict(type='mmpretrain.ResNetV1d', depth=18, **SMALL),
    ),
    'groups': (
        dict(type='mmpretrain.ResNeXtDBB', depth=50, groups=4, **SMALL)
        | dict(width_per_group=4),
        dict(type='mmpretrain.ResNeXt', depth=50, groups=4, **SMALL)
        | dict(width_per_group=4),
    ),
    'kept': (dict(RESNET, conv_cfg=dict(type='DBB')), RESNET),
    'kept, residuals start at zero': (
        dict(RESNET, conv_cfg=dict(type='DBB'), zero_init_residual=True),
        RESNET,
    ),
    'OREPA, 1x1 kernels too': (
        dict(type='mmpretrain.ResNetDBB', depth=50, **SMALL)
        | dict(block=dict(type='OREPA', max_kernel_size=6)),
        dict(type='mmpretrain.ResNet', depth=50, **SMALL),
    ),
    'OREPA kept in mmseg': (
        dict(RESNET, type='mmseg.ResNet')
        | dict(conv_cfg=dict(type='OREPA', max_kernel_size=6)),
        RESNET,
    ),
    'kept in mmdet': (
        dict(RESNET, type='mmdet.ResNet', conv_cfg=dict(type='DBB')),
        RESNET,
    ),
    'kept in mmseg': (
        dict(RESNET, type='mmseg.ResNet', conv_cfg=dict(type='RepVGGConv')),
        RESNET,
    ),
}


def built(cfg):
    for host in ('mmpretrain', 'mmdet', 'mmseg'):
        __import__(f'{host}.models')
    return MODELS.build(cfg)


def plain_file(folder, cfg, prefix='', **more):
    """A plain network with random norms, and a checkpoint of it."""
    plain = randomize(built(cfg)).double()
    plain.eval()
    state = {prefix + n: v for n, v in plain.state_dict().items()}
    path = str(folder / 'plain.pth')
    torch.save(dict(state_dict=dict(state, **more)), path)
    return plain, path


@torch.no_grad()
def assert_same(model, plain):
    model.double()
    model.eval()
    assert blocks_of(model)
    x = image(2, 3, 40, 33)
    with literal_forward(model):
        found = model(x)
    # Stages by default: the last one in mmpretrain, all elsewhere.
    assert distance(found[-1], plain(x)[-1]) < EXACT


@pytest.mark.parametrize('name', BACKBONES)
def test_from_a_config(name, tmp_path, quiet):
    cfg, plain_cfg = BACKBONES[name]
    plain, path = plain_file(tmp_path, plain_cfg)
    init_cfg = dict(type='PlainPretrained', checkpoint=path)
    model = built(dict(cfg, init_cfg=init_cfg)).double()
    parameters = list(model.parameters())
    model.init_weights()
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert_same(model, plain)


def test_merged_again_it_is_the_plain_checkpoint(tmp_path, quiet):
    plain, path = plain_file(tmp_path, RESNET)
    model = built(BACKBONES['kept'][0]).double()
    load_plain_weights_(model, path)
    model.eval()
    state = stock_state(model, plain)
    for name, value in plain.state_dict().items():
        if value.is_floating_point():
            assert (state[name] - value).abs().max() < 1e-9, name


def test_torchvision_names_at_full_size(monkeypatch, quiet):
    plain = randomize(torchvision.models.resnet18()).double().eval()
    asked = []

    def load(filename, *_, **__):
        asked.append(filename)
        return plain.state_dict()

    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', load)
    model = built(dict(type='mmpretrain.ResNetDBB', depth=18)).double()
    loaded = load_plain_weights_(model, 'torchvision://resnet18')
    assert asked == ['torchvision://resnet18']
    assert loaded.unexpected == ['fc.weight', 'fc.bias']
    assert not loaded.missing and not loaded.mismatched
    assert len(loaded.blocks) == 16
    head = plain.fc
    plain.avgpool, plain.fc = nn.Identity(), nn.Flatten()
    model.eval()
    x = image(1, 3, 64, 48)
    with torch.no_grad():
        expected = plain(x).reshape(1, 512, 2, 2)
        assert distance(model(x)[-1], expected) < EXACT
    assert head.out_features == 1000


TASKS = {
    'mmpretrain': dict(
        type='mmpretrain.ImageClassifier',
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(
            type='mmpretrain.LinearClsHead', num_classes=5, in_channels=32
        ),
    ),
    'mmdet': dict(
        type='mmdet.FCOS',
        neck=dict(
            type='mmdet.FPN',
            in_channels=[32],
            out_channels=8,
            num_outs=1,
        ),
        bbox_head=dict(
            type='mmdet.FCOSHead',
            num_classes=2,
            in_channels=8,
            feat_channels=8,
            strides=[32],
            norm_cfg=None,
        ),
    ),
    'mmseg': dict(
        type='mmseg.EncoderDecoder',
        decode_head=dict(
            type='mmseg.FCNHead',
            in_channels=32,
            in_index=0,
            channels=4,
            num_classes=3,
        ),
    ),
}


@pytest.mark.parametrize('start', ['absorbed', 'kept'])
@pytest.mark.parametrize('task', TASKS)
def test_in_whole_models(task, start, tmp_path, quiet):
    plain, path = plain_file(
        tmp_path,
        dict(RESNET, out_indices=(3,)),
        'backbone.',
        **{'head.fc.weight': torch.ones(7, 32), 'head.fc.bias': torch.ones(7)},
    )
    backbone = dict(
        BACKBONES[start][0],
        out_indices=(3,),
        init_cfg=dict(
            type='PlainPretrained', checkpoint=path, prefix='backbone.'
        ),
    )
    model = built(dict(TASKS[task], backbone=backbone)).double()
    model.init_weights()
    assert_same(model.backbone, plain)
    model.init_weights()  # a second time: nothing
    assert_same(model.backbone, plain)


@pytest.mark.parametrize('classes', [5, 7])
def test_whole_classifier(classes, tmp_path, quiet):
    cfg = dict(TASKS['mmpretrain'], backbone=BACKBONES['kept'][0])
    cfg['head'] = dict(cfg['head'], num_classes=classes)
    plain_cfg = dict(TASKS['mmpretrain'], backbone=RESNET)
    plain, path = plain_file(tmp_path, plain_cfg)
    init_cfg = dict(type='PlainPretrained', checkpoint=path)
    model = built(dict(cfg, init_cfg=init_cfg)).double()
    # A host's own rule for the backbone and the head comes before.
    model.init_weights()
    assert_same(model.backbone, plain.backbone)
    same_head = torch.equal(model.head.fc.bias, plain.head.fc.bias)
    assert same_head == (classes == 5)
    loaded = load_plain_weights_(model, path)
    assert loaded.mismatched == (
        [] if classes == 5 else ['head.fc.weight', 'head.fc.bias']
    )


def test_torchvision_names_in_a_classifier(quiet):
    names = torchvision.models.resnet18().state_dict()
    cfg = dict(
        TASKS['mmpretrain'],
        backbone=dict(type='mmpretrain.ResNetDBB', depth=18),
        head=dict(
            type='mmpretrain.LinearClsHead', num_classes=1000, in_channels=512
        ),
    )
    loaded = load_plain_weights_(built(cfg), names)
    assert loaded[1:] == ([], [], [])


def test_blocks_that_share_weights_start_once():
    block = DBB(3, 3, 3, padding=1)
    model = nn.Sequential(block, nn.ReLU(), block).double().eval()
    conv = nn.Conv2d(3, 3, 3, padding=1).double()
    plain = nn.Sequential(conv, nn.ReLU(), conv)
    loaded = load_plain_weights_(model, plain.state_dict())
    assert loaded.blocks == ['0', '2']
    x = image(2, 3, 6, 5)
    assert distance(model(x), plain(x)) < EXACT


# -------------------------------------------------------------------- errors


def bad_state(change):
    state = dict(built(RESNET).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ('start', 'change', 'message'),
    [
        (
            'kept',
            lambda s: s.pop('layer1.0.conv2.weight'),
            r'layer1\.0\.conv2: missing: layer1\.0\.conv2\.weight',
        ),
        (
            'absorbed',
            lambda s: s.pop('layer2.1.bn1.running_var'),
            r'layer2\.1\.conv1: missing: layer2\.1\.bn1\.running_mean',
        ),
        (
            'absorbed',
            lambda s: s.update({'layer2.1.bn1.bias': torch.ones(3)}),
            r'layer2\.1\.bn1\.bias has shape \(3,\)',
        ),
        (
            'kept',
            lambda s: s.update({'layer1.0.conv1.weight': torch.ones(4, 4)}),
            r'plain kernel has shape \(4, 4\)',
        ),
        ('kept', lambda s: s.clear(), r'and 13 more'),
        (
            'kept',
            lambda s: s.update({'a.branches.kxk.weight': torch.ones(1)}),
            'with blocks, not of a plain one',
        ),
        ('kept', lambda s: s.update(epoch=3), 'not all are tensors'),
    ],
)
def test_refuses_what_does_not_fit(start, change, message):
    model = built(BACKBONES[start][0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        load_plain_weights_(model, bad_state(change))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_says_what_it_left_out():
    def change(state):
        del state['conv1.weight']
        state['bn1.weight'] = torch.ones(3)
        state['more'] = torch.ones(1)

    loaded = load_plain_weights_(
        built(BACKBONES['absorbed'][0]), bad_state(change)
    )
    assert loaded.missing == ['conv1.weight']
    assert loaded.mismatched == ['bn1.weight']
    assert loaded.unexpected == ['more']


def test_refuses_models_without_blocks():
    with pytest.raises(UserError, match="of type 'Pretrained'"):
        load_plain_weights_(built(RESNET), {})


def test_refuses_files_that_are_not_there(tmp_path):
    model = built(BACKBONES['kept'][0])
    with pytest.raises(UserError, match='not found'):
        load_plain_weights_(model, str(tmp_path / 'no.pth'))
    with pytest.raises(UserError, match='no such checkpoint'):
        load_plain_weights_(model, 'torchvision://resnet1')
    _, path = plain_file(tmp_path, RESNET)
    with pytest.raises(UserError, match=r'nothing under neck\.'):
        load_plain_weights_(model, path, prefix='neck')


def test_a_stack_says_how_to_leave_it_plain():
    model = built(dict(RESNET, conv_cfg=dict(type='OREPA')))
    with pytest.raises(UserError, match='conv1: a stack .*max_kernel_size=6'):
        load_plain_weights_(model, built(RESNET).state_dict())


def test_rules_that_would_overwrite_are_refused(tmp_path, quiet):
    plain, path = plain_file(tmp_path, RESNET)
    own = dict(type='PlainPretrained', checkpoint=path)
    other = dict(type='Kaiming', layer=['Conv2d'])
    cfg = BACKBONES['kept'][0]
    model = built(dict(cfg, init_cfg=[other, own])).double()
    model.init_weights()
    assert_same(model, plain)
    for rules in (
        [own, other],
        [dict(type='Pretrained', checkpoint=path), own],
    ):
        model = built(dict(cfg, init_cfg=rules)).double()
        with pytest.raises(UserError, match='must be the last'):
            model.init_weights()


def test_children_start_before(tmp_path, quiet):
    class Child(nn.Sequential):
        """Not mmengine's, so it does not know that it is initialised."""

        def init_weights(self):
            nn.init.zeros_(self[0].weight)

    class Parent(BaseModule):
        def __init__(self, init_cfg):
            super().__init__(init_cfg)
            self.child = Child(nn.Conv2d(3, 3, 1))
            self.conv = DBB(3, 3, 3)

    path = str(tmp_path / 'plain.pth')
    state = {
        'child.0.weight': torch.ones(3, 3, 1, 1),
        'child.0.bias': torch.ones(3),
        'conv.weight': torch.ones(3, 3, 3, 3),
        'conv.bias': torch.ones(3),
    }
    torch.save(state, path)
    parent = Parent(dict(type='PlainPretrained', checkpoint=path))
    parent.init_weights()
    assert torch.equal(parent.child[0].weight, state['child.0.weight'])
    kernel = parent.conv.get_equivalent_kernel_bias().kernel
    assert torch.allclose(kernel, torch.ones(3, 3, 3, 3), atol=1e-5)


def test_stock_config_leaves_it_out():
    own = dict(type='PlainPretrained', checkpoint='torchvision://resnet18')
    other = dict(type='Kaiming', layer='Conv2d')
    cfg = stock_config(
        Config(
            dict(
                model=dict(
                    backbone=dict(BACKBONES['absorbed'][0], init_cfg=own),
                    neck=dict(type='mmdet.FPN', init_cfg=[other, own]),
                    head=dict(type='A', init_cfg=[own]),
                    other=dict(type='B', init_cfg=[other]),
                )
            )
        )
    ).model
    assert cfg.backbone.init_cfg is None
    assert cfg.neck.init_cfg == [other]
    assert cfg.head.init_cfg is None
    assert cfg.other.init_cfg == [other]
    assert 'Plain' not in str(cfg)
