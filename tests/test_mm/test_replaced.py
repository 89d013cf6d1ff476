"""Layers that a block's config replaces, and what hosts do with blocks."""

import copy

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from mmcv.cnn import ConvModule, build_conv_layer
from mmcv.cnn.rfsearch import RFSearchHook
from mmengine.config import Config
from mmengine.registry import MODELS
from registered import each_block, is_block_of, name_of
from torch import nn

from mmdbb import load_plain_weights_
from mmdbb.blocks import DBB, OREPAConv
from mmdbb.blocks.build import register_conv_layer
from mmdbb.mm.stock.config import stock_config
from mmdbb.plain_conv import AdaptiveConv2d
from mmdbb.registry import BLOCKS
from mmdbb.reparam import find_blocks
from mmdbb.stock_weights import stock_state

pytestmark = pytest.mark.usefixtures('quiet')

KINDS = each_block()
SMALL = dict(depth=18, base_channels=8, stem_channels=8)


def build(cfg):
    model = MODELS.build(copy.deepcopy(cfg)).double()
    model.train(False)
    return model


def plain_of(cfg):
    """The part of a config, as the stock config has it."""
    return stock_config(Config(dict(model=cfg))).model.to_dict()


@pytest.mark.parametrize(
    ('owner', 'options', 'layer'),
    [
        ('mmpretrain.EfficientNet', dict(arch='b0'), 'DBB'),
        ('mmdet.EfficientNet', dict(arch='b0'), 'OREPA'),
        ('mmpretrain.EfficientNetV2', dict(arch='b0'), DBB),
        ('mmseg.MobileNetV3', dict(arch='small'), DBB),
    ],
    ids=str,
)
def test_from_plain_weights_it_is_the_stock_network(owner, options, layer):
    """Whose pads follow from the image, or are set when it is built."""
    cfg = dict(type=owner, **options)
    plain = randomize(build(cfg))
    with_blocks = dict(cfg, conv_cfg=dict(type=layer))
    model = build(with_blocks)
    load_plain_weights_(model, plain.state_dict())
    stock = build(plain_of(with_blocks))
    stock.load_state_dict(stock_state(model, stock))
    assert len(find_blocks(model)) > 4
    for size in ((65, 50), (64, 64)):
        x = image(1, 3, *size)
        with torch.no_grad():
            expected, *others = (net(x)[-1] for net in (plain, model, stock))
        for found in others:
            assert distance(found, expected) < 1e-9  # many layers


def test_the_stock_config_says_the_padding():
    def layer(owner, **keys):
        cfg = dict(type=owner, conv_cfg=dict(type='DBB', **keys))
        return plain_of(cfg)['conv_cfg']

    adaptive = dict(type='Conv2dAdaptivePadding')
    for owner in ('mmpretrain.EfficientNet', 'mmdet.EfficientNet'):
        assert layer(owner) == adaptive
        assert layer(owner, adaptive_padding=False) == dict(type='Conv2d')
    resnet = 'mmpretrain.ResNet'
    assert layer(resnet) is None
    assert layer(resnet, adaptive_padding=True, bias=False) == dict(
        adaptive, bias=False
    )
    assert layer(resnet, padding_mode='reflect', single_init=True) == dict(
        type='Conv2d', padding_mode='reflect'
    )


def test_keys_of_conv2d_reach_the_stock_network():
    cfg = dict(
        type='mmpretrain.ResNet',
        **SMALL,
        conv_cfg=dict(type='DBB', padding_mode='reflect'),
    )
    model, stock = randomize(build(cfg)), build(plain_of(cfg))
    stock.load_state_dict(stock_state(model, stock))
    x = image(1, 3, 64, 48)
    assert distance(stock(x)[-1], model(x)[-1]) < EXACT


def test_the_padding_of_the_config_can_be_asked_for():
    cfg = dict(type='mmpretrain.EfficientNet', arch='b0')
    layer = dict(type='DBB', adaptive_padding=False)
    blocks = find_blocks(build(dict(cfg, conv_cfg=layer))).values()
    assert not any(block.adaptive_padding for block in blocks)
    large = dict(type='DBB', max_kernel_size=3)
    model = build(dict(cfg, conv_cfg=large))
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert AdaptiveConv2d in kinds  # of 5x5, which stay plain


def test_layers_of_another_kind_are_refused_by_name():
    class Standardized(nn.Module):
        def __init__(self, conv_cfg=dict(type='ConvWS')):  # noqa: B006
            super().__init__()
            self.conv = ConvModule(4, 4, 3, conv_cfg=conv_cfg)

    class Below(Standardized):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

    assert type(Standardized().conv.conv).__name__ == 'ConvWS2d'
    for kind in (Standardized, Below):
        with pytest.raises(
            ValueError, match=f"{kind.__name__} has .*'ConvWS'"
        ):
            kind(conv_cfg=dict(type='DBB'))

    # A network inside one, with a config of its own, is another matter.
    class Outer(nn.Module):
        def __init__(self, conv_cfg=dict(type='ConvWS')):  # noqa: B006
            super().__init__()
            self.inner = ConvModule(4, 4, 3, conv_cfg=dict(type='DBB'))

    assert type(Outer().inner.conv) is DBB


# A layer's type that is a class, as in mmengine's new configs


@pytest.mark.parametrize('size', [1, 2, 3, 6, 7, (1, 7)])
@KINDS
def test_a_class_builds_what_its_name_builds(kind, size):
    arguments = (4, 6, size, 2, 1)
    for cfg in (dict(), dict(min_kernel_size=1, max_kernel_size=9)):
        by_name = build_conv_layer(
            dict(cfg, type=name_of(kind)), *arguments, bias=False
        )
        by_class = build_conv_layer(
            dict(cfg, type=kind), *arguments, bias=False
        )
        module = ConvModule(*arguments, conv_cfg=dict(cfg, type=kind))
        assert type(by_class) is type(by_name) is type(module.conv)
        assert repr(by_class) == repr(by_name)
        assert cfg or (type(by_class) is kind) == is_block_of(
            kind, max(size if isinstance(size, tuple) else (size,))
        )
    # Without a config it is the block, of any size.
    assert type(kind(*arguments)) is kind


def test_a_class_of_ones_own_has_its_rule():
    try:

        @register_conv_layer('Own', min_kernel_size=5, max_kernel_size=9)
        class Own(DBB):
            pass

        class Unregistered(Own):
            pass

        for kind in ('Own', Own, Unregistered):
            made = [
                type(build_conv_layer(dict(type=kind), 4, 4, size))
                for size in (3, 5, 9, 11)
            ]
            own = Own if isinstance(kind, str) else kind
            assert made == [nn.Conv2d, own, own, nn.Conv2d]
        with pytest.raises(TypeError, match="unknown keys .'nothing'."):
            build_conv_layer(dict(type=Own, nothing=1), 4, 4, 5)
    finally:
        del BLOCKS.module_dict['Own'], MODELS.module_dict['Own']


def test_a_network_of_classes_has_the_blocks_of_names():
    cfg = dict(type='mmpretrain.ResNet', **SMALL)
    found = [
        list(find_blocks(build(dict(cfg, conv_cfg=dict(type=kind)))))
        for kind in ('DBB', DBB)
    ]
    assert found[0] == found[1] and len(found[0]) == 16


# What hosts do with the weight


@pytest.mark.parametrize('layer', ['DBB', DBB])
def test_a_spectral_norm_is_refused(layer):
    cfg = dict(conv_cfg=dict(type=layer), with_spectral_norm=True)
    with pytest.raises(ValueError, match='with_spectral_norm=True of ConvMod'):
        ConvModule(4, 4, 3, **cfg)
    ConvModule(4, 4, 1, **cfg)  # a plain convolution has a weight to norm


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('layer', ['DBB', 'OREPA'])
def test_mmcvs_efficient_eval(layer, bias):
    def module(**options):
        made = ConvModule(
            4,
            4,
            3,
            stride=2,
            bias=bias,
            conv_cfg=dict(type=layer),
            norm_cfg=dict(type='BN'),
            **options,
        )
        return randomize(made.double()).eval()

    x = image(2, 4, 9, 8)
    plain, efficient = module(), module(efficient_conv_bn_eval=True)
    efficient.load_state_dict(plain.state_dict())
    expected = plain(x)
    if layer == 'DBB' and not bias:
        with pytest.raises(AttributeError, match='Merge first'):
            efficient(x)
    else:
        assert distance(efficient(x), expected) < EXACT


def test_tood_reads_a_composed_kernel():
    cfg = dict(
        type='mmdet.TOODHead',
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        stacked_convs=2,
        anchor_type='anchor_free',
        norm_cfg=dict(type='GN', num_groups=2),
        conv_cfg=dict(type='OREPA'),
        anchor_generator=dict(
            type='AnchorGenerator',
            ratios=[1.0],
            octave_base_scale=8,
            scales_per_octave=1,
            strides=[8, 16],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        initial_loss_cls=dict(type='FocalLoss'),
        loss_cls=dict(type='QualityFocalLoss'),
        loss_bbox=dict(type='GIoULoss'),
    )
    head, plain = build(cfg), build(dict(cfg, conv_cfg=None))
    assert type(head.cls_decomp.reduction_conv.conv) is OREPAConv
    randomize(head)
    plain.load_state_dict(stock_state(head, plain))
    x = [image(2, 8, 8, 8), image(2, 8, 4, 4)]
    for mode in (True, False):
        head.train(mode)
        plain.train(mode)
        for found, expected in zip(head(x), plain(x)):
            for one, other in zip(found, expected):
                assert distance(one, other) < EXACT
    with pytest.raises(AttributeError, match='training mode has no weight'):
        layer = dict(type='DBB', min_kernel_size=1)
        build(dict(cfg, conv_cfg=layer)).train()(x)


def test_a_search_of_dilations_inside_a_block_is_refused():
    model = nn.Sequential(DBB(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3))
    search = dict(
        step=0,
        max_step=2,
        search_interval=1,
        exp_rate=0.5,
        init_alphas=0.01,
        mmin=1,
        mmax=24,
        num_branches=2,
        skip_layer=['stem'],
    )
    hook = RFSearchHook('search', dict(search=search), verbose=False)
    hook.init_model(model)
    with pytest.raises(ValueError, match='inside a block was changed'):
        model(torch.rand(1, 4, 8, 8))
