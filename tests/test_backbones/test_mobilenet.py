"""MobileNet-V1: the paper's network, plain and with blocks, merged exactly."""

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from mmengine.config import Config
from mmpretrain.registry import MODELS
from torch import nn

from mmdbb.blocks import ACB, DBB
from mmdbb.mm.backbones import MobileNetV1, MobileNetV1DBB
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.stock.config import stock_config
from mmdbb.reparam import find_blocks, literal_forward, reparameterize
from mmdbb.stock_weights import stock_state

CHANNELS = (4, 8, 4, 8, 8, 16)


def small(cls=MobileNetV1DBB, **kwargs):
    kwargs.setdefault('channels', CHANNELS)
    kwargs.setdefault('out_indices', range(6))
    return cls(**kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_plain_has_the_papers_size():
    # 4,231,976 with the classifier of 1000 classes (1,025,000).
    assert parameters(MobileNetV1()) == 4_231_976 - 1_025_000
    # The weight and bias of an absorbed norm are now the merged bias.
    absorbed = 32 + 32 + 64 + 128 * 2 + 256 * 2 + 512 * 6 + 1024
    merged = MobileNetV1DBB(deploy=True)
    assert parameters(merged) == 4_231_976 - 1_025_000 - absorbed


def test_blocks_stand_where_the_papers_do():
    model = small()
    blocks = find_blocks(model)
    layers = [
        f'layer{i}.{j}.depthwise_conv.conv'
        for i, n in enumerate((1, 2, 2, 6, 2), 1)
        for j in range(n)
    ]
    assert list(blocks) == ['conv1.conv', *layers]
    assert all(type(block) is DBB for block in blocks.values())
    assert list(blocks['conv1.conv'].branches) == [
        'kxk',
        '1x1',
        '1x1_avg',
        '1x1_kxk',
    ]
    depthwise = blocks[layers[1]]
    assert list(depthwise.branches) == ['kxk', '1x1_avg', '1x1_kxk']
    assert depthwise.branches['1x1_kxk'].conv1.out_channels == 16  # 2 x 8
    strides = [blocks[name].stride[0] for name in blocks]
    assert strides == [2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    assert isinstance(model.layer1[0].depthwise_conv.norm, nn.Identity)
    assert isinstance(model.layer1[0].pointwise_conv.norm, nn.BatchNorm2d)


# Those of the papers that train it, or have another depthwise form.
@pytest.mark.parametrize('block', ['DBB', 'ACB', 'RepVGGConv'])
def test_merged_is_equal(block):
    model = randomize(small(block=dict(type=block)).double()).eval()
    x = image(2, 3, 40, 56)
    merged = reparameterize(model)
    assert not find_blocks(merged)
    with torch.no_grad(), literal_forward(model):
        outputs = list(zip(merged(x), model(x)))
    sizes = [(20, 28), (20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]
    assert [tuple(found.shape[1:]) for found, _ in outputs] == [
        (channels, *size) for channels, size in zip(CHANNELS, sizes)
    ]
    model.switch_to_deploy()
    model.switch_to_deploy()
    with torch.no_grad():
        switched = model(x)
    for (found, expected), again in zip(outputs, switched):
        assert distance(found, expected) < EXACT
        assert torch.equal(again, found)


def test_merges_to_the_plain_network():
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            custom_imports=dict(
                imports=['mmdbb', 'mmdbb.backbones', 'collections'],
                allow_failed_imports=False,
            ),
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='MobileNetV1DBB',
                    channels=CHANNELS,
                    block=dict(type='DBB'),
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
            ),
        )
    )
    stock_cfg = stock_config(cfg)
    assert stock_cfg.custom_imports.imports == [
        'collections',
        'mmdbb.backbones',
    ]
    assert stock_cfg.model.backbone == dict(
        type='mmpretrain.MobileNetV1', channels=CHANNELS
    )
    model = randomize(build_model(cfg).double())
    stock = build_model(stock_cfg).double()
    assert parameters(stock.backbone) == parameters(small(MobileNetV1))
    stock.load_state_dict(stock_state(model, stock))
    x = image(2, 3, 40, 56)
    with torch.no_grad():
        assert distance(stock(x), model(x)) < EXACT


def test_host_norm_stays_under_conv_cfg():
    model = small(MobileNetV1, conv_cfg=dict(type='ACB')).double().eval()
    randomize(model)
    assert all(isinstance(b, ACB) for b in find_blocks(model).values())
    assert isinstance(model.conv1.norm, nn.BatchNorm2d)
    x = image(2, 3, 20, 28)
    with torch.no_grad():
        found = reparameterize(model)(x)[-1]
        assert distance(found, model(x)[-1]) < EXACT


def test_registered_in_mmpretrain():
    model = MODELS.build(dict(type='MobileNetV1', base_channels=2))
    assert model.channels == (2, 4, 8, 16, 32, 64)
    assert isinstance(
        MODELS.build(dict(type='MobileNetV1DBB', base_channels=2)), MobileNetV1
    )


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(channels=(1, 2)), 'channels must be six'),
        (dict(out_indices=(6,)), 'out_indices must be some of 0 to 5'),
        (dict(out_indices=()), 'out_indices must be some of 0 to 5'),
        (dict(frozen_stages=6), 'frozen_stages must be one of -1 to 5'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV1(**kwargs)


@pytest.mark.parametrize('cls', [MobileNetV1, MobileNetV1DBB])
@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(out_indices=5), 'out_indices must be some of 0 to 5, .* got 5'),
        (dict(out_indices='5'), "out_indices must be some of .* got '5'"),
        (dict(out_indices=(1.5,)), r'out_indices must be .* got \(1.5,\)'),
        (dict(channels=8), 'channels must be six positive .* got 8'),
        (dict(channels=(8.0,) * 6), r'channels must be six .* got \(8.0, '),
        (dict(base_channels='a'), 'channels must be six positive'),
    ],
)
def test_arguments_of_wrong_types(cls, kwargs, message):
    with pytest.raises(TypeError, match=message):
        cls(**kwargs)


def test_conv_cfg_is_refused():
    with pytest.raises(TypeError, match='takes block='):
        MobileNetV1DBB(conv_cfg=dict(type='DBB'))
