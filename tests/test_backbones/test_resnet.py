"""ResNets whose blocks stand for convolution and norm."""

import copy
import importlib.util
from pathlib import Path

import mmpretrain
import pytest
import torch
from helpers import blocks_of, distance, image, randomize
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models import ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks import ACB, DBB, OREPAConv
from mmdbb.mm.backbones import (
    MobileNetV1,
    MobileNetV1DBB,
    ResNetDBB,
    ResNetV1cDBB,
    ResNetV1dDBB,
    ResNeXtDBB,
)
from mmdbb.stock_weights import stock_state

pytestmark = pytest.mark.usefixtures('quiet')

NARROW = dict(base_channels=8, stem_channels=8)
SHAPE = (2, 3, 32, 48)
#: Class -> its stock network, arguments, number of blocks.
VARIANTS = {
    'ResNetDBB-18': (ResNetDBB, 'ResNet', dict(depth=18, **NARROW), 16),
    'ResNetDBB-50': (ResNetDBB, 'ResNet', dict(depth=50, **NARROW), 16),
    'ResNetV1cDBB-50': (
        ResNetV1cDBB,
        'ResNetV1c',
        dict(
            depth=50,
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
            **NARROW,
        ),
        19,
    ),
    'ResNetV1dDBB-18': (
        ResNetV1dDBB,
        'ResNetV1d',
        dict(depth=18, **NARROW),
        19,
    ),
    'ResNeXtDBB-50': (
        ResNeXtDBB,
        'ResNeXt',
        dict(depth=50, groups=4, width_per_group=4, base_channels=8),
        16,
    ),
}
EACH = pytest.mark.parametrize('name', VARIANTS)


def ours(name, **more):
    cls, _, arguments, _ = VARIANTS[name]
    model = cls(**{**arguments, **more})
    model.init_weights()
    return model


def stock(name):
    _, kind, arguments, _ = VARIANTS[name]
    return MODELS.build(dict(type=f'mmpretrain.{kind}', **arguments))


def count(model):
    return sum(p.numel() for p in model.parameters())


@EACH
def test_blocks_absorb_the_norms(name):
    model = ours(name)
    blocks = blocks_of(model)
    assert len(blocks) == VARIANTS[name][3]
    assert all(type(b) is DBB for b in blocks)
    inside = {m for b in blocks for m in b.modules()}
    norms = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m not in inside
    ]
    stock_norms = [
        m for m in stock(name).modules() if isinstance(m, _BatchNorm)
    ]
    assert len(norms) == len(stock_norms) - len(blocks)


@EACH
def test_deployed_is_as_large_as_the_stock_network(name):
    model, plain = ours(name), stock(name)
    widths = sum(b.out_channels for b in blocks_of(model))
    before = count(model)
    state = stock_state(model, plain)
    assert list(state) and set(state) == set(plain.state_dict())
    model.switch_to_deploy()
    # A bias in place of the norm's weight and bias.
    assert count(model) == count(plain) - widths
    assert before > 1.3 * count(model)


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_depths(depth):
    model = ResNetDBB(depth, base_channels=2, stem_channels=2)
    blocks = {18: 16, 34: 32, 50: 16, 101: 33, 152: 50}
    assert len(blocks_of(model)) == blocks[depth]


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_built_from_any_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(
            dict(type='mmpretrain.ResNetDBB', depth=18, **NARROW)
        )
    assert type(model) is ResNetDBB


# Arguments


def test_another_block():
    model = ResNetDBB(18, block=dict(type='ACB', reduce_gamma=True), **NARROW)
    blocks = blocks_of(model)
    assert all(type(b) is ACB for b in blocks)
    model.init_weights()
    third = torch.tensor(1 / 3)
    for block in blocks:
        for branch in block.branches.values():
            assert (branch.last_norm.weight == third).all()


def test_norm_cfg_is_that_of_all_norms():
    model = ResNetDBB(18, norm_cfg=dict(type='BN', eps=0.1), **NARROW)
    eps = {m.eps for m in model.modules() if isinstance(m, _BatchNorm)}
    assert eps == {0.1}
    own = dict(type='DBB', norm_cfg=dict(type='BN', eps=0.2))
    model = ResNetDBB(18, block=own, **NARROW)
    inside = {
        m.eps
        for b in blocks_of(model)
        for m in b.modules()
        if isinstance(m, _BatchNorm)
    }
    assert inside == {0.2} and model.norm1.eps == 1e-5
    assert own == dict(type='DBB', norm_cfg=dict(type='BN', eps=0.2))


@pytest.mark.parametrize('block', [dict(type='BN'), dict(type='ResNet')])
def test_what_is_no_block(block):
    message = "block must name a block, got type='.*'; allowed: .'ACB',"
    with pytest.raises(ValueError, match=message):
        ResNetDBB(18, block=block)


# One whose name is its class's, and one whose is not.
@pytest.mark.parametrize('block', [DBB, OREPAConv])
def test_a_class_builds_what_its_name_does(block):
    name = 'OREPA' if block is OREPAConv else block.__name__
    by_name = ResNetDBB(50, block=dict(type=name), **NARROW)
    by_class = ResNetDBB(50, block=dict(type=block), **NARROW)
    assert repr(by_class) == repr(by_name)


@pytest.mark.parametrize(
    'options, error, message',
    [
        (dict(block='DBB'), TypeError, "such as dict.type='DBB'., got 'DBB'"),
        (dict(depth='18'), ValueError, "one of .18, .*152.*, got '18'"),
        (dict(stage_blocks=(1, 1)), ValueError, r'from 1 on, got \(1, 1\)'),
        (dict(stage_blocks=(1, 0, 1, 1)), ValueError, r'got \(1, 0, 1, 1\)'),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        ResNetDBB(**dict(dict(depth=18), **options))


def test_merged_blocks_are_left_as_they_are_made():
    block = dict(type='DBB', deploy=True)
    model = ResNetDBB(18, zero_init_residual=True, block=block, **NARROW)
    model.init_weights()
    assert model.layer1[0].conv2.reparam_conv.weight.any()


def test_a_class_without_a_name():
    class Mine(DBB):
        pass

    with pytest.raises(ValueError, match='Mine has no name in configs'):
        ResNetDBB(18, block=dict(type=Mine))


@pytest.mark.parametrize('kind', [ResNetDBB, MobileNetV1DBB])
def test_plain_convolutions(kind):
    args = dict(base_channels=8)
    if kind is ResNetDBB:
        args.update(depth=18, stem_channels=8)
    model = kind(block=dict(type='Conv2d'), **args)
    stock = (ResNet if kind is ResNetDBB else MobileNetV1)(**args)
    assert repr(model).partition('(')[2] == repr(stock).partition('(')[2]
    assert list(model.state_dict()) == list(stock.state_dict())
    model.switch_to_deploy()  # nothing to do


def test_conv_cfg_is_refused():
    with pytest.raises(TypeError, match='takes block=dict.*not conv_cfg'):
        ResNetDBB(18, conv_cfg=dict(type='DBB'))


def test_unknown_key_of_the_block():
    with pytest.raises(TypeError, match="unknown keys .'colour'.; allowed"):
        ResNetDBB(18, block=dict(type='DBB', colour=1))


# Initialisation


def test_identities_and_gammas_survive():
    model = ours('ResNetDBB-18', block=dict(type='DBB', single_init=True))
    for block in blocks_of(model):
        assert block.branches['1x1_kxk'].conv1.weight.abs().max() == 0
        gammas = [
            b.last_norm.weight.unique().tolist()
            for b in block.branches.values()
        ]
        assert gammas == [[1.0], [0.0], [0.0], [0.0]]


def last_gammas(model, conv):
    return {
        gamma
        for n, m in model.named_modules()
        if n.startswith('layer')
        and n.endswith(f'.{conv}')
        and hasattr(m, 'branches')
        for b in m.branches.values()
        for gamma in b.last_norm.weight.tolist()
    }


@pytest.mark.parametrize('zero', [True, False, None])
def test_zero_init_residual(zero):
    more = {} if zero is None else dict(zero_init_residual=zero)
    model = ours('ResNetDBB-18', **more)
    assert last_gammas(model, 'conv1') == {1.0}
    assert last_gammas(model, 'conv2') == ({0.0} if zero else {1.0})
    # The 3x3 of a bottleneck is not what ends the residual.
    model = ours('ResNetDBB-50', **more)
    assert last_gammas(model, 'conv2') == {1.0}
    expected = 0.0 if zero else 1.0
    assert (model.layer1[0].norm3.weight == expected).all()


# Freezing


@pytest.mark.parametrize('frozen', [-1, 0, 1, 2])
def test_frozen_stages_reach_the_norms_inside(frozen):
    model = ResNetDBB(18, frozen_stages=frozen, **NARROW).train()
    stages = [model.norm1, model.layer1, model.layer2, model.layer3]
    for i, stage in enumerate(stages):
        is_frozen = i <= frozen
        norms = [m for m in stage.modules() if isinstance(m, _BatchNorm)]
        assert all(n.training is not is_frozen for n in norms)
        parameters = list(stage.parameters())
        assert all(p.requires_grad is not is_frozen for p in parameters)
    before = copy.deepcopy(dict(model.layer1.named_buffers()))
    model(image(*SHAPE, dtype=torch.float32))
    moved = [
        n
        for n, b in model.layer1.named_buffers()
        if not torch.equal(b, before[n])
    ]
    assert bool(moved) is (frozen < 1)


def test_norm_eval_reaches_the_norms_inside():
    model = ResNetDBB(18, norm_eval=True, **NARROW).train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert norms and not any(n.training for n in norms)
    before = copy.deepcopy(model.state_dict())
    model(image(*SHAPE, dtype=torch.float32))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_frozen_deployed_network():
    # Before any call of train(): an optimizer may be built first.
    model = ResNetDBB(18, frozen_stages=1, deploy=True, **NARROW)
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert all(p.requires_grad for p in model.layer2.parameters())


def test_train_returns_the_network():
    model = ResNetDBB(18, **NARROW)
    assert model.train() is model and model.eval() is model


# mmpretrain's own tool


def tool_of_mmpretrain():
    path = Path(mmpretrain.__file__).parent / '.mim' / 'tools'
    path = path / 'model_converters' / 'reparameterize_model.py'
    if not path.is_file():
        pytest.skip('mmpretrain is installed without its tools')
    spec = importlib.util.spec_from_file_location('the_tool', path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def classifier(**backbone):
    model = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(
                type='mmpretrain.ResNetDBB', depth=18, **NARROW, **backbone
            ),
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(
                type='mmpretrain.LinearClsHead', num_classes=3, in_channels=64
            ),
        )
    )
    return model.eval()


def test_mmpretrain_reparameterize_tool(tmp_path):
    model = randomize(classifier())
    x = image(*SHAPE, dtype=torch.float32)
    expected = model(x)
    checkpoint = dict(state_dict=model.state_dict(), meta=dict(epoch=3))
    path = tmp_path / 'deployed.pth'
    tool = tool_of_mmpretrain()
    tool.convert_classifier_to_deploy(model, checkpoint, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded['meta'] == dict(epoch=3)
    deployed = classifier(deploy=True)
    deployed.load_state_dict(loaded['state_dict'])
    assert not blocks_of(deployed)
    assert not any(isinstance(m, DBB) for m in deployed.modules())
    assert distance(deployed(x), expected) < 1e-4
    assert isinstance(deployed.backbone.layer1[0].norm1, nn.Identity)
