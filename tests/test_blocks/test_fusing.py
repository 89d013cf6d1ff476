"""mmcv's fuse_conv_bn around blocks that are not merged: right, or loud."""

import copy

import pytest
from helpers import EXACT, distance, image, randomize
from mmcv.cnn import ConvModule, fuse_conv_bn
from registered import each_block, name_of
from torch import nn

from mmdbb import reparameterize
from mmdbb.blocks import DBB

KINDS = each_block()
X = image(2, 4, 6, 7)


def conv():
    return nn.Conv2d(4, 4, 1)


def norm():
    return nn.BatchNorm2d(4)


def block(kind=DBB):
    return kind(4, 4, 3, padding=1)


def layer(kind):
    return dict(type=name_of(kind))


def network(*modules):
    return randomize(nn.Sequential(*modules).double()).eval()


#: Networks in which a norm would be fused across a block.
WRONG = {
    'neighbours': lambda kind: (conv(), block(kind), norm()),
    'others between': lambda kind: (
        conv(),
        nn.ReLU(),
        block(kind),
        nn.ReLU(),
        norm(),
    ),
    'inside a container': lambda kind: (
        conv(),
        nn.Sequential(block(kind), nn.ReLU()),
        norm(),
    ),
    'deep inside': lambda kind: (
        conv(),
        nn.Sequential(nn.Sequential(nn.ReLU(), block(kind))),
        norm(),
    ),
    'of a ConvModule': lambda kind: (
        conv(),
        ConvModule(4, 4, 3, padding=1, conv_cfg=layer(kind)),
        norm(),
    ),
    'two blocks': lambda kind: (conv(), block(kind), block(kind), norm()),
}


@KINDS
@pytest.mark.parametrize('case', WRONG)
def test_wrong_fusion_is_refused(case, kind):
    model = network(*WRONG[case](kind))
    expected = model(X)
    match = (
        rf"would fuse '\d' of a Sequential into '0', although a "
        rf'{kind.__name__} stands between .* merge first'
    )
    with pytest.raises(ValueError, match=match):
        fuse_conv_bn(model)
    # What it says helps, and nothing was fused wrongly until then.
    assert distance(model(X), expected) < EXACT
    merged = reparameterize(model)
    if case in ('neighbours', 'others between', 'two blocks'):
        last = [m for m in merged if isinstance(m, nn.Conv2d)][-1]
        weight = last.weight.clone()
        fused = fuse_conv_bn(merged)
        assert distance(last.weight, weight) > 0.01
        if case != 'others between':  # a ReLU before the norm
            assert distance(fused(X), expected) < EXACT


RIGHT = {
    'block': lambda kind: (block(kind),),
    'block and norm': lambda kind: (block(kind), norm()),
    'each its norm': lambda kind: (conv(), norm(), block(kind), norm()),
    'no norm behind': lambda kind: (conv(), block(kind), nn.ReLU()),
    'other conv between': lambda kind: (conv(), block(kind), conv(), norm()),
    'norm inside a container': lambda kind: (
        conv(),
        nn.Sequential(block(kind), norm()),
    ),
    'norm first': lambda kind: (norm(), conv(), block(kind)),
}


@KINDS
@pytest.mark.parametrize('case', RIGHT)
def test_right_fusion_stays(case, kind):
    model = network(*RIGHT[case](kind))
    expected = model(X)
    fused = fuse_conv_bn(copy.deepcopy(model))
    assert distance(fused(X), expected) < EXACT
    merged = fuse_conv_bn(reparameterize(model))
    assert distance(merged(X), expected) < EXACT


def test_merged_block_is_no_obstacle_of_ours():
    model = nn.Sequential(block(), norm())
    model[0].switch_to_deploy()
    model = network(*model)
    expected = model(X)
    assert distance(fuse_conv_bn(model)(X), expected) < EXACT


def test_other_walks_go_through():
    model = network(conv(), block(), norm())
    names = [name for name, _ in model[1].named_children()]
    assert names == ['branches'] == list(model[1]._modules)
    assert list(model[1].children()) == list(model[1]._modules.values())
    model.train()
    assert all(module.training for module in model.modules())
