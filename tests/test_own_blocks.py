"""Blocks of other packages, merged by their own methods and compared."""

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from networks import NARROW
from torch import nn

from mmdbb import DBB, reparameterize
from mmdbb.deploy import (
    MergeOptions,
    Proof,
    Source,
    build_model,
    deploy_checkpoint,
    load_deployed,
)
from mmdbb.errors import UserError
from mmdbb.own_blocks import has_own_blocks, merge_own_blocks
from mmdbb.reparam import find_blocks

pytestmark = pytest.mark.usefixtures('quiet')
X = image(2, 4, 13, 14)


class TwoBranches(nn.Module):
    """Two kernels of one size, which the methods below sum."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.one(x) + self.two(x))

    def merge(self):
        """New layers are in the default dtype, as in the real packages."""
        conv = nn.Conv2d(4, 4, 3, padding=1)
        conv.weight.data = (self.one.weight + self.two.weight).detach()
        conv.bias.data = (self.one.bias + self.two.bias).detach()
        return conv


class InPlace(TwoBranches):
    """As mmpretrain's, mmyolo's, and the papers' code."""

    def forward(self, x):
        return torch.relu(self.conv(x)) if self.merged else super().forward(x)

    merged = False

    def switch_to_deploy(self):
        if self.merged:
            return
        self.conv, self.merged = self.merge(), True
        del self.one, self.two

    def reparameterize(self):
        """As mmpretrain's: returns the kernel, and fails once merged."""
        return self.one.weight, self.two.weight


class AsTimm(TwoBranches):
    def forward(self, x):
        conv = getattr(self, 'conv', None)
        return torch.relu(conv(x)) if conv else super().forward(x)

    def reparameterize(self):
        if hasattr(self, 'one'):
            self.conv = self.merge()
            del self.one, self.two


class Returned(TwoBranches):
    """As timm's RepViT."""

    def fuse(self):
        return nn.Sequential(self.merge(), nn.ReLU())


class AsUltralytics(TwoBranches):
    def forward_fuse(self, x):
        return torch.relu(self.conv(x))

    def fuse(self):
        if hasattr(self, 'one'):
            self.conv = self.merge()
            del self.one, self.two


class RepConv(AsUltralytics):
    fuse = None

    def fuse_convs(self):
        AsUltralytics.fuse(self)


KINDS = [InPlace, AsTimm, Returned, AsUltralytics, RepConv]


def network(kind):
    block = nn.Sequential(kind(), nn.Conv2d(4, 4, 1))
    return nn.Sequential(nn.Conv2d(4, 4, 1), block, kind())


@pytest.mark.parametrize('kind', KINDS)
def test_kinds(kind):
    model = network(kind).double().eval()
    expected = model(X)
    merged = reparameterize(model)
    assert distance(merged(X), expected) < EXACT
    convs = [m for m in merged.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 4
    assert not any(module.training for module in merged.modules())
    # The original is what it was.
    assert torch.equal(model(X), expected) and has_own_blocks(model)
    assert merge_own_blocks(model).blocks == ['1.0', '2']
    with pytest.raises(ValueError, match='has no block to merge'):
        reparameterize(merged)
    assert reparameterize(model, inplace=True) is model
    assert torch.equal(model(X), merged(X))


@pytest.mark.parametrize('kind', KINDS)
def test_precision_and_root(kind):
    block = kind().float().train()
    merged = reparameterize(block)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert torch.get_default_dtype() is torch.float32
    assert merged.training
    x = X.float()
    assert distance(merged(x), block(x)) < 1e-6


class Wrong(InPlace):
    def merge(self):
        conv = super().merge()
        conv.bias.data[1] += 1e-6
        return conv


class Failing(InPlace):
    def merge(self):
        raise AssertionError('only BN')


def test_wrong_methods_are_refused():
    model = network(Wrong)
    with pytest.raises(ValueError, match='1.0 computes something else once'):
        reparameterize(model)
    with pytest.raises(ValueError, match=r'1.0 cannot .*switch_to_.*only BN'):
        reparameterize(network(Failing))
    assert has_own_blocks(model)


class Unlike(TwoBranches):
    """Methods of the same names that merge nothing."""

    def fuse(self):
        self.two = None

    def reparameterize(self, how):
        del self.one

    switch_to_deploy = nn.Identity()


def test_other_methods_are_left_alone():
    model = nn.Sequential(Unlike(), nn.Conv2d(4, 4, 1))
    assert not has_own_blocks(model)
    with pytest.raises(ValueError, match='has no block to merge'):
        reparameterize(model)


def test_a_block_in_two_places():
    block = InPlace().double()
    merged = reparameterize(nn.Sequential(block, nn.ReLU(), block))
    assert merged[0] is merged[2]


def test_mixed():
    """mmdbb's first, theirs if asked for."""
    model = nn.Sequential(DBB(4, 4, 3, padding=1), InPlace()).double()
    model = randomize(model).eval()
    mine = reparameterize(model)
    assert type(mine[0]) is nn.Conv2d and not mine[1].merged
    both = reparameterize(model, also_own=True)
    assert type(both[0]) is nn.Conv2d and both[1].merged
    for merged in (mine, both):
        assert distance(merged(X), model(X)) < EXACT
    only_mine = nn.Sequential(DBB(4, 4, 3))
    assert type(reparameterize(only_mine, also_own=True)[0]) is nn.Conv2d


def test_a_bias_that_their_method_forgets():
    """mmpretrain's merge knows no bias, and builds a block again."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(mobileone(conv_cfg=dict(type='DBB')))
    randomize(model).eval()
    with pytest.raises(ValueError, match='first into .* by merge_into_'):
        reparameterize(model, also_own=True)


ARCH = dict(num_blocks=[1, 1, 1, 1], width_factor=[0.125] * 4)
REPVGG = dict(ARCH, group_layer_map=None, se_cfg=None)


def mobileone(**options):
    arch = dict(
        ARCH, num_conv_branches=[2, 1, 1, 1], num_se_blocks=[0, 0, 0, 1]
    )
    return dict(type='MobileOne', arch=arch, **options)


def repvgg(**options):
    return dict(type='RepVGG', arch=dict(REPVGG, **options), out_indices=(3,))


def deploy(tmp_path, backbone, channels=64, **options):
    model = dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=channels),
    )
    cfg = Config(dict(default_scope='mmpretrain', model=model))
    path = str(tmp_path / 'trained.pth')
    trained = randomize(build_model(cfg))
    torch.save(trained.state_dict(), path)
    result = deploy_checkpoint(
        Source(cfg, path),
        str(tmp_path / 'out.pth'),
        MergeOptions(**options),
        Proof(image_size=(64, 48)),
    )
    merged = load_deployed(result.config, result.checkpoint)
    x = image(2, 3, 64, 48, dtype=torch.float32)
    assert distance(merged(x), trained(x)) < 1e-4
    return result, merged


@pytest.mark.parametrize('fuse', [False, True])
def test_mmpretrains_networks_become_files(tmp_path, fuse):
    result, merged = deploy(tmp_path, repvgg(), fuse=fuse)
    assert result.blocks == 0 and result.left == 0 and not result.own_left
    assert result.own[0] == 'backbone.stem' and len(result.own) == 5
    assert {'backbone.stem', 'features.0'} <= {*result.difference.compared}
    assert result.parameters[0] > result.parameters[1]
    cfg = Config.fromfile(result.config)
    assert cfg.model.backbone.deploy and 'mmdbb' not in cfg.pretty_text
    assert merged.backbone.stem.deploy


def test_mmpretrains_networks_with_blocks(tmp_path):
    backbone = mobileone(conv_cfg=dict(type='DBB'))
    for name in 'ab':
        (tmp_path / name).mkdir()
    result, merged = deploy(tmp_path / 'a', backbone)
    assert result.blocks == 6 and result.own == [] and result.own_left
    assert has_own_blocks(merged) and not find_blocks(merged)
    result, merged = deploy(tmp_path / 'b', backbone, also_own=True)
    assert result.blocks == 6 and len(result.own) == 9
    assert not result.own_left and not has_own_blocks(merged)


def test_mmpretrains_fault_is_found(tmp_path):
    """Its merged RepVGG forgets squeeze-and-excitation."""
    backbone = repvgg(se_cfg=dict(ratio=4, divisor=1))
    with pytest.raises(UserError, match='computes something else'):
        deploy(tmp_path, backbone)
    assert [path.name for path in tmp_path.iterdir()] == ['trained.pth']


def test_networks_without_any(tmp_path):
    resnet = dict(type='ResNet', depth=18, **NARROW)
    with pytest.raises(UserError, match='no block to merge'):
        deploy(tmp_path, resnet)
    (tmp_path / 'b').mkdir()
    with pytest.raises(UserError, match='no re-parameterizable blocks of its'):
        deploy(
            tmp_path / 'b',
            dict(resnet, conv_cfg=dict(type='DBB')),
            also_own=True,
        )


TIMM = {
    'byobnet.RepVggBlock': (4, 4),
    'byobnet.MobileOneBlock': (4, 4),
    'fastvit.RepMixer': (4, 3),
    'repvit.RepVggDw': (4, 3),
}


@pytest.mark.parametrize('name', TIMM)
def test_timm(name):
    models = pytest.importorskip('timm.models')
    module, _, kind = name.partition('.')
    block = getattr(getattr(models, module), kind)(*TIMM[name])
    model = randomize(nn.Sequential(block)).double().eval()
    merged = reparameterize(model)
    assert distance(merged(X), model(X)) < EXACT
    counts = [sum(p.numel() for p in m.parameters()) for m in (merged, model)]
    assert counts[0] < counts[1]
