"""The norms behind convolutions in networks of the hosts, by the data."""

import copy

import numpy as np
import pytest
import torch
from helpers import EXACT, blocks_of, deploy, distance, image, randomize
from mmcv.cnn import build_conv_layer
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmdbb import load_plain_weights_, reparameterize
from mmdbb.compare import compare_networks, network_outputs
from mmdbb.errors import UserError
from mmdbb.mm.data_flow import norms_of, run_on_image
from mmdbb.mm.deploy.load import build_model, load_deployed
from mmdbb.ports import PORTS
from mmdbb.reparam import find_blocks
from mmdbb.stock_weights import stock_state
from mmdbb.untouched import changed_layers, prove_untouched

pytestmark = pytest.mark.usefixtures('quiet')
DBB = dict(type='DBB')
SIZE = (64, 32)


def stage(kind, **arguments):
    """One stage of a residual network, narrow."""
    return dict(
        type=kind,
        depth=50,
        num_stages=1,
        out_indices=(0,),
        strides=(1,),
        dilations=(1,),
        stem_channels=4,
        base_channels=4,
        **arguments,
    )


def hrnet_stage(count):
    channels = tuple(4 * 2**i for i in range(count))
    return dict(
        num_modules=1,
        num_branches=count,
        block='BOTTLENECK' if count == 1 else 'BASIC',
        num_blocks=(1,) * count,
        num_channels=channels,
    )


HRNET = dict(extra={f'stage{i}': hrnet_stage(i) for i in range(1, 5)})
RTMDET = dict(
    type='mmdet.RTMDet',
    backbone=dict(
        type='mmdet.CSPNeXt',
        deepen_factor=0.167,
        widen_factor=0.0625,
        norm_cfg=dict(type='BN'),
    ),
    neck=dict(
        type='mmdet.CSPNeXtPAFPN',
        in_channels=[16, 32, 64],
        out_channels=16,
        num_csp_blocks=1,
        norm_cfg=dict(type='BN'),
    ),
    bbox_head=dict(
        type='mmdet.RTMDetInsSepBNHead',
        num_classes=2,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        share_conv=True,
        norm_cfg=dict(type='BN'),
        anchor_generator=dict(
            type='mmdet.MlvlPointGenerator', offset=0, strides=[8, 16, 32]
        ),
        bbox_coder=dict(type='mmdet.DistancePointBBoxCoder'),
    ),
)
NETWORKS = {
    'mmpretrain Res2Net': stage('mmpretrain.Res2Net', scales=4, base_width=8),
    'mmdet Res2Net': stage('mmdet.Res2Net', scales=4, base_width=8),
    'mmpretrain ResNeSt': stage('mmpretrain.ResNeSt'),
    'mmseg ResNeSt': stage('mmseg.ResNeSt'),
    'mmpretrain HRNet': dict(type='mmpretrain.HRNet', **HRNET),
    'mmdet HRNet': dict(type='mmdet.HRNet', **HRNET),
    'mmseg HRNet': dict(type='mmseg.HRNet', **HRNET),
    'mmdet RTMDet-Ins': RTMDET,
}


def build(cfg, blocks=False, seed=0):
    for host in ('mmpretrain', 'mmdet', 'mmseg'):
        __import__(f'{host}.models')
    cfg = copy.deepcopy(cfg)
    if blocks:
        parts = [cfg[p] for p in ('backbone', 'neck', 'bbox_head') if p in cfg]
        for part in parts or [cfg]:
            part['conv_cfg'] = DBB
    torch.manual_seed(seed)
    model = randomize(MODELS.build(cfg), seed).double()
    model.eval()
    return model


def same(model, other):
    x = image(1, 3, *SIZE)
    with torch.no_grad():
        found, expected = network_outputs(model, x), network_outputs(other, x)
    return all(distance(found[n], y) < EXACT for n, y in expected.items())


@pytest.mark.parametrize('name', NETWORKS)
def test_merged_into_the_stock_network(name):
    model, stock = build(NETWORKS[name], blocks=True), build(NETWORKS[name])
    found = norms_of(stock, SIZE)
    assert (found.by, found.reason) == ('data', '')
    blocks = find_blocks(model)
    assert set(blocks) <= set(found.pairs)
    assert norms_of(model, SIZE) == found
    modules = dict(stock.named_modules())
    for norms in found.pairs.values():
        assert all(isinstance(modules[n], nn.BatchNorm2d) for n in norms)
    stock.load_state_dict(stock_state(model, stock, found), strict=True)
    difference = compare_networks(
        model, stock, [image(1, 3, *SIZE)], norms=found.pairs
    )
    assert difference.largest < EXACT
    prove_untouched(model, stock, found.pairs)


@pytest.mark.parametrize('name', NETWORKS)
def test_started_from_the_plain_network(name):
    model, plain = (
        build(NETWORKS[name], blocks=True),
        build(NETWORKS[name], seed=5),
    )
    loaded = load_plain_weights_(model, plain.state_dict())
    assert loaded[1:] == ([], [], [])
    assert same(model, plain)


def test_a_norm_a_level_takes_the_bias():
    model, stock = build(RTMDET, blocks=True), build(RTMDET)
    pairs = norms_of(stock, SIZE).pairs
    behind = tuple(f'bbox_head.cls_convs.{i}.0.bn' for i in range(3))
    # One convolution under six names: a level each, and two towers.
    for tower in ('cls_convs', 'reg_convs'):
        for level in range(3):
            assert pairs[f'bbox_head.{tower}.{level}.0.conv'] == behind
    head = model.bbox_head
    assert head.reg_convs[2][0].conv is head.cls_convs[0][0].conv
    chains = list(changed_layers(model, stock, pairs))
    proven = [c[1] for c in chains if 'cls_convs' in c[0] or 'reg' in c[0]]
    assert sorted(proven) == sorted(behind)
    assert len(chains) == len(set(blocks_of(model))) + 2
    state = stock_state(model, stock)
    bias = head.cls_convs[0][0].conv.get_equivalent_kernel_bias().bias
    before = model.state_dict()
    for tower in ('cls_convs', 'reg_convs'):
        for level in range(3):
            mean = f'bbox_head.{tower}.{level}.0.bn.running_mean'
            assert distance(state[mean], before[mean] - bias) < EXACT


def test_each_norm_is_proven():
    """A wrong bias in the last level alone is found."""
    model, stock = build(RTMDET, blocks=True), build(RTMDET)
    state = stock_state(model, stock)
    mean = 'bbox_head.cls_convs.2.0.bn.running_mean'
    state[mean] = state[mean.replace('cls', 'reg')] = state[mean] + 1e-3
    stock.load_state_dict(state)
    for chain in changed_layers(model, stock, norms_of(stock, SIZE).pairs):
        x = image(1, model.get_submodule(chain[0]).in_channels, 7, 6)
        found, expected = x, x
        for layer in chain:
            found = stock.get_submodule(layer)(found)
            expected = model.get_submodule(layer)(expected)
        wrong = chain[-1] == 'bbox_head.cls_convs.2.0.bn'
        assert (distance(found, expected) < EXACT) != wrong


@pytest.mark.parametrize('kind', ['res2net', 'rtmdet'])
def test_deployed_as_files(kind, tmp_path):
    if kind == 'rtmdet':
        model = copy.deepcopy(RTMDET)
        model['data_preprocessor'] = dict(type='mmdet.DetDataPreprocessor')
        for part in ('backbone', 'neck', 'bbox_head'):
            model[part]['conv_cfg'] = DBB
    else:
        backbone = dict(NETWORKS['mmdet Res2Net'], conv_cfg=DBB)
        model = dict(
            type='mmseg.EncoderDecoder',
            backbone=backbone,
            data_preprocessor=dict(type='mmseg.SegDataPreProcessor'),
            decode_head=dict(
                type='mmseg.FCNHead',
                in_channels=16,
                in_index=0,
                channels=4,
                num_classes=3,
                norm_cfg=dict(type='BN'),
            ),
        )
    cfg = Config(dict(default_scope='mmdet', model=model))
    trained = randomize(build_model(cfg))
    torch.save(trained.state_dict(), tmp_path / 'trained.pth')
    source, out = tmp_path / 'trained.pth', tmp_path / 'out.pth'
    result = deploy(cfg, source, out, image_size=SIZE)
    assert result.difference.largest < 1e-9
    assert result.blocks == len(set(blocks_of(trained)))
    network = load_deployed(result.config, result.checkpoint)
    assert not blocks_of(network)
    if kind == 'rtmdet':
        # A convolution with a norm a level keeps all of them.
        fused = deploy(
            cfg, source, tmp_path / 'fused.pth', image_size=SIZE, fuse=True
        )
        assert fused.difference.largest < 1e-9
        network = load_deployed(fused.config, fused.checkpoint)
        head = network.bbox_head.cls_convs
        assert isinstance(head[1][0].bn, nn.BatchNorm2d)
        assert head[1][0].conv is head[0][0].conv
        # One of the names, and the block is merged in all its places.
        part = deploy(
            cfg,
            source,
            tmp_path / 'part.pth',
            image_size=SIZE,
            only=['bbox_head.reg_convs.1.0.conv'],
        )
        assert (part.blocks, part.left) == (1, result.blocks - 1)


def test_a_concatenation_has_no_place():
    cgnet = dict(
        type='mmseg.CGNet',
        norm_cfg=dict(type='BN'),
        num_channels=(4, 8, 16),
        num_blocks=(1, 1),
    )
    model, stock = build(cgnet, blocks=True), build(cgnet)
    found = norms_of(stock, SIZE)
    assert 'level1.0.f_loc' not in found.pairs and found.by == 'data'
    with pytest.raises(
        UserError,
        match='the merged level1.0.f_loc has no place in the stock network: '
        'its convolution has none, and no norm alone reads its output',
    ):
        stock_state(model, stock, found)


class Head(nn.Module):
    """Fails on features alone, after its first norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.norm1_name = 'bn'

    def forward(self, x, boxes=None):
        y = self.conv(x)
        return self.bn(y) + y[boxes['none']]


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.bbox_head = Head()
        # Nothing runs it.
        self.roi_head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def extract_feat(self, x):
        return self.backbone(x)


def test_what_a_run_does_not_reach_is_found_by_names(monkeypatch):
    said = []
    monkeypatch.setattr(PORTS, 'log', lambda text, level: said.append(text))
    found = norms_of(Detector(), (16, 12))
    assert found.by == 'data'
    assert found.pairs == {
        'backbone.0': ('backbone.1',),
        'roi_head.0': ('roi_head.1',),
    }
    assert found.reason == 'a run does not reach bbox_head.conv, roi_head.0'
    assert found.unreached == {'bbox_head.conv', 'roi_head.0'}
    assert len(said) == 1 and 'not by the data: roi_head.0 (a r' in said[0]


class Unrunnable(Detector):
    def extract_feat(self, x):
        raise KeyError('boxes')

    def forward(self, x):
        if x.mean() > 0:
            return x


def test_networks_that_cannot_run_are_found_by_names(monkeypatch):
    said = []
    monkeypatch.setattr(PORTS, 'log', lambda text, level: said.append(text))
    found = norms_of(Unrunnable(), (16, 12))
    assert found.by == 'names' and len(found.pairs) == 2
    assert "it cannot be run: 'boxes'; Unrunnable cannot be t" in found.reason
    assert len(said) == 1 and found.reason in said[0]


def test_looking_leaves_the_random_state_alone():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x + torch.rand(1))

    model = Noisy(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).train()
    before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    assert norms_of(model, (9, 8)).pairs == {'0': ('1',)}
    assert torch.equal(torch.get_rng_state(), before[0])
    assert model.training and model[1].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[1][name])
    assert run_on_image(model, (9, 8))['output'].shape == (1, 4, 7, 6)


def test_the_reason_is_that_of_the_convolution():
    stock = Detector().double().eval()
    stock.backbone[1] = nn.ReLU()
    stock.backbone[0].bias = stock.bbox_head.conv.bias = None
    for name, why in (
        ('backbone.0', 'no norm alone reads its output'),
        ('bbox_head.conv', r'is known to follow \(a run does not reach bbox_'),
    ):
        model = copy.deepcopy(stock)
        parent, _, child = name.rpartition('.')
        block = blocks_of(build(dict(type='DBB', **CONV[name])))[0]
        setattr(model.get_submodule(parent), child, block)
        with pytest.raises(UserError, match=f'merged {name} has .*{why}'):
            stock_state(model, stock)


CONV = {
    'backbone.0': dict(in_channels=3, out_channels=4, kernel_size=3),
    'bbox_head.conv': dict(in_channels=4, out_channels=4, kernel_size=3),
}


@pytest.mark.parametrize('stride, same', [(2, True), (3, False)])
def test_numbers_of_numpy_are_numbers(stride, same):
    """mmdet3d's SECONDFPN computes kernels and strides by numpy."""
    block = build_conv_layer(DBB, 3, 4, 3)
    model = nn.Sequential(block, nn.Conv2d(4, 4, 2, stride=2)).eval()
    merged = reparameterize(model)
    sizes = np.int64(2), np.int64(stride)
    merged[1] = nn.Conv2d(4, 4, sizes[0], stride=sizes[1]).eval()
    merged[1].load_state_dict(model[1].state_dict())
    if same:
        prove_untouched(model, merged)
        return
    with pytest.raises(UserError, match='no copy .*: 1'):
        prove_untouched(model, merged)
