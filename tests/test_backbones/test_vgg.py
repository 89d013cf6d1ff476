"""VGG with blocks merges into mmpretrain's VGG."""

import copy

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from mmengine.config import Config
from mmpretrain.models import VGG
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdbb.blocks import DBB
from mmdbb.mm.backbones import VGGDBB
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.stock.config import stock_config
from mmdbb.reparam import find_blocks, reparameterize
from mmdbb.stock_weights import stock_state

BN = dict(type='BN', requires_grad=True)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def multiplications(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()
        model(x)
    return counter.get_total_flops()


def test_every_convolution_is_a_block():
    with torch.device('meta'):
        model = VGGDBB(16)
    blocks = find_blocks(model)
    assert len(blocks) == 13
    assert all(type(block) is DBB for block in blocks.values())
    widths = [block.out_channels for block in blocks.values()]
    assert widths == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert isinstance(model.features[0].norm, nn.Identity)


@pytest.fixture(scope='module')
def networks():
    """A classifier with ACBs, the stock one, and what the stock is built of.

    Three of five stages: their layers are those of all.
    """
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            custom_imports=dict(imports=['mmdbb.backbones']),
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='VGGDBB',
                    depth=11,
                    num_stages=3,
                    dilations=(1, 1, 1),
                    out_indices=(0, 2),
                    block=dict(type='ACB'),
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(
                    type='StackedLinearClsHead',
                    num_classes=3,
                    in_channels=256,
                    mid_channels=[16],
                ),
            ),
        )
    )
    stock_cfg = stock_config(cfg)
    model = randomize(build_model(cfg).double())
    stock = build_model(stock_cfg).double()
    stock.load_state_dict(stock_state(model, stock))
    return model, stock, stock_cfg


def test_merged_is_the_stock_network(networks):
    model, stock, stock_cfg = networks
    assert stock_cfg.model.backbone == dict(
        type='mmpretrain.VGG',
        depth=11,
        num_stages=3,
        dilations=(1, 1, 1),
        out_indices=(0, 2),
        norm_cfg=BN,
    )
    assert 'custom_imports' not in stock_cfg
    assert type(stock.backbone) is VGG
    x = image(2, 3, 24, 16)
    with torch.no_grad():
        merged = reparameterize(model.backbone)(x)
        switched = copy.deepcopy(model.backbone)
        switched.switch_to_deploy()
        switched.switch_to_deploy()
        assert all(map(torch.equal, switched(x), merged))
        outputs = zip(merged, stock.backbone(x), model.backbone(x))
        for found, in_stock, expected in outputs:
            assert distance(found, expected) < EXACT
            assert distance(in_stock, expected) < EXACT
        assert distance(stock(x)[0], model(x)[0]) < EXACT


def test_merged_costs_what_the_stock_network_does(networks):
    model, stock, _ = networks
    x = image(1, 3, 16, 16)
    merged = reparameterize(model.backbone)
    assert multiplications(merged, x) == multiplications(stock.backbone, x)
    norms = [m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)]
    in_norms = sum(map(parameters, norms))
    assert parameters(merged) == parameters(stock.backbone) - in_norms > 0
