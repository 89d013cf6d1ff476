"""Which checkpoints a training or a test refuses before they are loaded."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from registered import each_block, name_of
from torch import nn

from mmdbb import DiverseBranchBlock
from mmdbb.errors import UserError
from mmdbb.mm.engine.fitting import FittingCheckpointHook
from mmdbb.reparam import holds_blocks

pytestmark = pytest.mark.usefixtures('quiet')


def build(**config):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(config)


def runner(model):
    return SimpleNamespace(model=model)


def fit(model, state):
    hook = FittingCheckpointHook('a.pth')
    hook.after_load_checkpoint(runner(model), dict(state_dict=state))


HRNET = dict(
    type='HRNet',
    extra=dict(
        stage1=dict(
            num_modules=1,
            num_branches=1,
            block='BOTTLENECK',
            num_blocks=(1,),
            num_channels=(8,),
        ),
        stage2=dict(
            num_modules=1,
            num_branches=2,
            block='BASIC',
            num_blocks=(1, 1),
            num_channels=(8, 16),
        ),
        stage3=dict(
            num_modules=1,
            num_branches=3,
            block='BASIC',
            num_blocks=(1, 1, 1),
            num_channels=(8, 16, 32),
        ),
        stage4=dict(
            num_modules=1,
            num_branches=4,
            block='BASIC',
            num_blocks=(1, 1, 1, 1),
            num_channels=(8, 16, 32, 64),
        ),
    ),
)


def test_hrnets_branches_are_no_blocks():
    plain = build(**HRNET)
    blocks = build(**HRNET, conv_cfg=dict(type='DBB'))
    assert any('branches.' in name for name in plain.state_dict())
    for model in (plain, blocks):
        assert not holds_blocks(plain.state_dict(), model)
        assert holds_blocks(blocks.state_dict(), model)


@each_block()
def test_other_networks_blocks_are_blocks(kind):
    conv_cfg = dict(type=name_of(kind))
    model = nn.Sequential(build(**conv_cfg, **CONV), nn.BatchNorm2d(4))
    assert holds_blocks(model.state_dict(), nn.Conv2d(3, 4, 1))


CONV = dict(in_channels=4, out_channels=4, kernel_size=3)


def test_layers_that_load_in_their_own_way():
    vit = dict(
        type='VisionTransformer',
        arch=dict(
            embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8
        ),
        patch_size=16,
    )
    small, large = build(**vit, img_size=32), build(**vit, img_size=64)
    assert small.pos_embed.shape != large.pos_embed.shape
    fit(large, small.state_dict())  # it resizes them
    block = DiverseBranchBlock(4, 4, 3, padding=1)
    names = {ours: theirs for theirs, ours in block.names[:-1]}
    state = {}
    for name, value in block.state_dict().items():
        ours = next(n for n in names if name.startswith(n))
        state[names[ours] + name[len(ours) :]] = value
    assert 'dbb_origin.conv.weight' in state
    fit(block, state)
    del state['dbb_origin.conv.weight']
    with pytest.raises(UserError, match='a.pth does not fit the network'):
        fit(block, state)


def test_a_shape_that_differs():
    state = nn.Conv2d(3, 4, 3).state_dict()
    with pytest.raises(UserError, match='of another shape: weight'):
        fit(nn.Conv2d(3, 4, 1), state)
    norm = nn.BatchNorm2d(4)
    with pytest.raises(UserError, match='missing: weight'):
        fit(norm, {})
    fit(norm, dict(norm.state_dict(), running_mean=torch.zeros(3)))
