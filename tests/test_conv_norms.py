"""Which norm follows which convolution in what hosts build."""

import pytest
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from torch import nn

from mmdbb.conv_norms import conv_norm_pairs, norm_names

pytestmark = pytest.mark.usefixtures('quiet')
BN = dict(type='BN')


def test_conv_module():
    module = ConvModule(4, 8, 3, norm_cfg=BN)
    assert norm_names(module) == {'conv': ('bn',)}
    assert norm_names(nn.Sequential(module)) == {'0.conv': ('0.bn',)}
    assert norm_names(ConvModule(4, 8, 3)) == {}
    grouped = ConvModule(4, 8, 3, norm_cfg=dict(type='GN', num_groups=2))
    assert norm_names(grouped) == {'conv': ('gn',)}


@pytest.mark.parametrize(
    'order, found',
    [
        (('conv', 'norm', 'act'), True),
        (('act', 'conv', 'norm'), True),
        (('conv', 'act', 'norm'), False),
        (('norm', 'act', 'conv'), False),
    ],
)
def test_order_of_a_conv_module(order, found):
    channels = 8 if order.index('norm') > order.index('conv') else 4
    module = ConvModule(4, channels, 3, norm_cfg=BN, order=order)
    assert bool(norm_names(module)) is found


def test_sequential():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    )
    assert norm_names(model) == {'0': ('1',)}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    assert '0' not in norm_names(model)


@pytest.mark.parametrize(
    'kind', ['mmpretrain.ResNet', 'mmdet.ResNet', 'mmseg.ResNetV1c']
)
@pytest.mark.parametrize('depth', [18, 50])
def test_residual_networks(kind, depth):
    model = MODELS.build(
        dict(type=kind, depth=depth, base_channels=8, stem_channels=8)
    )
    pairs = norm_names(model)
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert set(pairs) == set(convs)
    norms = dict(model.named_modules())
    for conv, (norm,) in pairs.items():
        assert isinstance(norms[norm], nn.BatchNorm2d), norm
        channels = norms[conv].out_channels
        assert norms[norm].num_features == channels
    assert pairs['layer1.0.conv2'] == ('layer1.0.bn2',)


def test_pairs_name_the_attributes():
    module = ConvModule(4, 8, 3, norm_cfg=BN)
    (pair,) = conv_norm_pairs(module)
    assert pair.parent is module and (pair.conv, pair.norm) == ('conv', 'bn')
