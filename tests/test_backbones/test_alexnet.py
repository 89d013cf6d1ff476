"""AlexNet with norms: the DBB code's network, merged exactly."""

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdbb.mm.backbones import AlexNetDBB, PlainAlexNet
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.stock.config import stock_config
from mmdbb.reparam import find_blocks, literal_forward, reparameterize
from mmdbb.stock_weights import stock_state

SMALL = dict(channels=(4, 6, 8, 8, 4), hidden_channels=8, num_classes=5)
SIZE = (224, 200)  # pixels


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def multiplications(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()
        model(x)
    return counter.get_total_flops()


def test_plain_is_the_papers():
    with torch.device('meta'):
        model = PlainAlexNet(1000)
    convs = [
        (m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0], m.bias)
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert convs == [
        (64, 11, 4, 2, None),
        (192, 5, 1, 2, None),
        (384, 3, 1, 1, None),
        (384, 3, 1, 1, None),
        (256, 3, 1, 1, None),
    ]
    linear = [
        (m.in_features, m.out_features)
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    assert linear == [(9216, 4096), (4096, 4096), (4096, 1000)]
    assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == 2
    channels = SMALL['channels']
    features = PlainAlexNet(channels=channels, out_indices=range(5))
    shapes = [y.shape[1:] for y in features(torch.rand(1, 3, 224, 224))]
    assert shapes == [(c, n, n) for c, n in zip(channels, (27, 13, 13, 13, 6))]


def test_pooling_before_the_classifier_changes_nothing_at_224():
    model = PlainAlexNet(**SMALL).eval()
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)[0]
        model.pool = nn.Identity()
        assert torch.equal(model(x)[0], expected)


def test_blocks_stand_where_the_papers_do():
    model = AlexNetDBB(**SMALL)
    assert list(find_blocks(model)) == [f'conv{i}.conv' for i in (2, 3, 4, 5)]
    assert isinstance(model.conv1.norm, nn.BatchNorm2d)
    assert isinstance(model.conv2.norm, nn.Identity)


# Norms inside the blocks, and behind them; for every block, see RepVGG.
@pytest.mark.parametrize('block', ['DBB', 'ACB', 'OREPA'])
def test_merged_is_equal(block):
    model = AlexNetDBB(
        **SMALL, block=dict(type=block), out_indices=range(5)
    ).double()
    randomize(model).eval()
    x = image(2, 3, *SIZE)
    merged = reparameterize(model)
    with torch.no_grad(), literal_forward(model):
        outputs = list(zip(merged(x), model(x)))
    assert len(outputs) == 6
    assert outputs[-1][0].shape == (2, 5)
    model.switch_to_deploy()
    model.switch_to_deploy()
    with torch.no_grad():
        switched = model(x)
    for (found, expected), again in zip(outputs, switched):
        assert distance(found, expected) < EXACT
        assert torch.equal(again, found)


def test_merges_to_the_plain_network():
    backbone = dict(type='AlexNetDBB', block=dict(type='ACB'), **SMALL)
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            custom_imports=dict(imports=['mmdbb.backbones']),
            model=dict(
                type='ImageClassifier',
                backbone=backbone,
                head=dict(type='ClsHead'),
            ),
        )
    )
    stock_cfg = stock_config(cfg)
    assert stock_cfg.model.backbone == dict(
        type='mmpretrain.PlainAlexNet', **SMALL
    )
    assert stock_cfg.custom_imports.imports == ['mmdbb.backbones']
    model = randomize(build_model(cfg).double())
    stock = build_model(stock_cfg).double()
    stock.load_state_dict(stock_state(model, stock))
    x = image(2, 3, *SIZE)
    with torch.no_grad():
        assert distance(stock(x)[0], model(x)[0]) < EXACT
    assert parameters(stock.backbone) == parameters(PlainAlexNet(**SMALL))
    x = x.float()
    assert multiplications(
        reparameterize(AlexNetDBB(**SMALL)), x
    ) == multiplications(PlainAlexNet(**SMALL), x)


@pytest.mark.parametrize('cls', [PlainAlexNet, AlexNetDBB])
def test_train_step_changes_everything(cls):
    model = cls(**dict(SMALL, hidden_channels=32)).train()
    model.init_weights()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    output = model(image(8, 3, 96, 96, dtype=torch.float32))[0]
    (output * torch.randn_like(output)).sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert not [k for k, v in after.items() if torch.equal(v, before[k])]


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(channels=(1, 2)), 'channels must be five'),
        (dict(out_indices=(5,)), 'out_indices must be some of 0 to 4'),
        (dict(frozen_stages=5), 'frozen_stages must be one of -1 to 4'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PlainAlexNet(**kwargs)
