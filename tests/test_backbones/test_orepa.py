"""Networks of the OREPA paper: every convolution composed, norms kept."""

import pytest
import torch
from helpers import EXACT, blocks_of, distance, image, randomize, tensors
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmdbb.mm.backbones  # noqa: F401
from mmdbb import OREPAConv
from mmdbb.kernels import StackedKernel
from mmdbb.stock_weights import stock_state

NARROW = dict(base_channels=8, stem_channels=8)
SHAPE = (2, 3, 64, 48)
# Backbone, arguments, and which convolutions of the stock network are blocks.
NETWORKS = {
    'ResNet-18': ('ResNet', dict(depth=18, **NARROW), '3x3 and stem'),
    'ResNet-50': ('ResNet', dict(depth=50, **NARROW), 'all'),
    'ResNeXt-50': (
        'ResNeXt',
        dict(depth=50, groups=8, width_per_group=4, **NARROW),
        'all',
    ),
}
EACH = pytest.mark.parametrize('name', NETWORKS)


def ours(name, **more):
    kind, arguments, _ = NETWORKS[name]
    cfg = dict(type=f'mmpretrain.{kind}DBB', block=dict(type='OREPA'))
    model = MODELS.build(dict(cfg, **arguments, **more))
    model.init_weights()
    return model


def stock(name):
    kind, arguments, _ = NETWORKS[name]
    return MODELS.build(dict(type=f'mmpretrain.{kind}', **arguments))


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]


def entries(model):
    return {name: value.shape for name, value in model.state_dict().items()}


@EACH
def test_which_convolutions_are_blocks(name):
    model, plain = ours(name), stock(name)
    convs = [
        n
        for n, m in plain.named_modules()
        if isinstance(m, nn.Conv2d)
        and (NETWORKS[name][2] == 'all' or m.kernel_size != (1, 1))
    ]
    found = [n for n, m in model.named_modules() if isinstance(m, OREPAConv)]
    assert found == convs
    assert norms(model) == norms(plain)
    assert isinstance(model.conv1.generator, StackedKernel)


@EACH
def test_trains_and_merges_into_the_stock_network(name):
    model = ours(name).train()
    model(image(*SHAPE, dtype=torch.float32))[-1].square().mean().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    model = randomize(model.double()).eval()
    plain = stock(name).double()
    plain.eval()
    plain.load_state_dict(stock_state(model, plain))
    x = image(*SHAPE)
    with torch.no_grad():
        expected = model(x)
        assert distance(tensors(plain(x))[-1], expected[-1]) < EXACT
        model.switch_to_deploy()
        assert distance(tensors(model(x))[-1], expected[-1]) < EXACT
    assert not blocks_of(model)
    # A convolution without bias stays one: its parameters are all of them.
    assert entries(model) == entries(plain)
    fresh = ours(name, deploy=True).double().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x)[-1], model(x)[-1])


def test_the_shortcuts_rule_can_be_overruled():
    block = dict(type='OREPA', min_kernel_size=1)
    model = MODELS.build(
        dict(type='mmpretrain.ResNetDBB', depth=18, block=block, **NARROW)
    )
    assert type(model.layer2[0].downsample[0]) is OREPAConv
    assert block == dict(type='OREPA', min_kernel_size=1)
