"""Fused networks: from any trained checkpoint, whatever the stock network."""

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from mmengine.config import Config
from networks import DBB, SHALLOW, SIZE
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmdbb  # noqa: F401
from mmdbb.deploy import (
    MergeOptions,
    Proof,
    Source,
    deploy_checkpoint,
    load_deployed,
)
from mmdbb.errors import UserError
from mmdbb.export import export_checkpoint
from mmdbb.mm.deploy.fused import fold_norms_
from mmdbb.mm.deploy.load import build_model
from mmdbb.reparam import literal_forward

pytestmark = pytest.mark.usefixtures('quiet')
PREPROCESSOR = dict(mean=[120.0] * 3, std=[60.0] * 3)
#: Group norms follow the head's blocks, so no bias has a place there.
FCOS = dict(
    default_scope='mmdet',
    model=dict(
        type='FCOS',
        data_preprocessor=dict(type='DetDataPreprocessor', **PREPROCESSOR),
        backbone=dict(type='ResNet', conv_cfg=DBB, **SHALLOW),
        neck=dict(
            type='FPN',
            in_channels=[8, 16],
            out_channels=8,
            num_outs=2,
            conv_cfg=DBB,
        ),
        bbox_head=dict(
            type='FCOSHead',
            num_classes=2,
            in_channels=8,
            feat_channels=8,
            stacked_convs=1,
            strides=[4, 8],
            regress_ranges=((-1, 64), (64, 1e8)),
            norm_cfg=dict(type='GN', num_groups=2),
            conv_cfg=DBB,
        ),
    ),
)
#: Two blocks are concatenated before one norm. mmcv's fuse_conv_bn would fold
#: it into the second one.
CGNET = dict(
    default_scope='mmseg',
    model=dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', **PREPROCESSOR),
        backbone=dict(
            type='CGNet',
            num_channels=(8, 16, 32),
            num_blocks=(2, 1),
            reductions=(2, 2),
            norm_cfg=dict(type='BN'),
            act_cfg=dict(type='PReLU', num_parameters=8),
            conv_cfg=DBB,
        ),
        decode_head=dict(
            type='FCNHead',
            in_channels=64,
            in_index=2,
            channels=8,
            num_convs=1,
            kernel_size=1,
            concat_input=False,
            num_classes=3,
            norm_cfg=dict(type='BN'),
        ),
        test_cfg=dict(mode='whole'),
    ),
)
#: Network, and a block that the stock network has no place for.
NETWORKS = dict(
    fcos=(FCOS, 'bbox_head.cls_convs.0.conv'),
    cgnet=(CGNET, 'backbone.level1.0.f_loc'),
)


def source_of(name, folder):
    cfg = Config(NETWORKS[name][0])
    model = randomize(build_model(cfg))
    for module in model.modules():  # scales that do not vanish
        if isinstance(module, _BatchNorm):
            module.weight.data.abs_().clamp_(min=0.3)
    path = folder / 'trained.pth'
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return Source(cfg, str(path)), model


@pytest.mark.parametrize('name', NETWORKS)
def test_any_checkpoint_becomes_fused(name, tmp_path):
    source, model = source_of(name, tmp_path)
    block, proof = NETWORKS[name][1], Proof(image_size=SIZE)
    out = str(tmp_path / 'out.pth')
    with pytest.raises(UserError, match=f'merged {block} has no place'):
        deploy_checkpoint(source, out, proof=proof)
    result = deploy_checkpoint(source, out, MergeOptions(fuse=True), proof)
    loaded = load_deployed(result.config, result.checkpoint)
    assert loaded.get_submodule(block).bias.any()
    x = image(2, 3, *SIZE)
    with literal_forward(model.double()), torch.no_grad():
        expected = model.extract_feat(x)
    with torch.no_grad():
        found = loaded.double().extract_feat(x)
    for y, z in zip(found, expected):
        assert distance(y, z) < 1e-5
    assert 'conv_cfg=dict' not in Config.fromfile(result.config).pretty_text


def test_onnx_holds_any_bias(tmp_path):
    pytest.importorskip('onnxruntime')
    source, _ = source_of('fcos', tmp_path)
    out = str(tmp_path / 'out.onnx')
    proof = Proof(image_size=SIZE)
    result = export_checkpoint(source, out, 'onnx', head=True, proof=proof)
    assert result.difference.largest < 1e-4


class Crossed(nn.Module):
    """Registers its layers in another order than it calls them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1, bias=False)
        self.second = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.third = nn.Conv2d(4, 4, 1)
        self.shared = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.second(self.norm(self.first(x)))
        return self.shared(self.third(y)) + self.shared(y)


class Shared(nn.Module):
    """Two convolutions have one norm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.norm(self.first(x)) * self.norm(self.second(x))


def test_a_norm_is_folded_only_where_it_reads_the_convolution_alone():
    model = randomize(Crossed().double()).eval()
    x = image(2, 3, 5, 4)
    expected = model(x)
    fold_norms_(model, {'first': ('norm',)})
    assert distance(model(x), expected) < EXACT
    assert isinstance(model.norm, nn.BatchNorm2d)
    model, x = randomize(Shared().double()).eval(), image(2, 3, 5, 4)
    expected = model(x)
    fold_norms_(model, {'first': ('norm',), 'second': ('norm',)})
    assert distance(model(x), expected) < EXACT
    pair = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    pair = randomize(pair.double()).eval()
    expected = pair(x)
    fold_norms_(pair, {'0': ('1',)})
    assert type(pair[1]) is nn.Identity and pair[0].bias is not None
    assert distance(pair(x), expected) < EXACT
