"""The stock network: its config, its weights, without mmdbb."""

import copy
import subprocess
import sys

import pytest
import torch
from helpers import EXACT, blocks_of, deploy, distance, image, randomize
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from networks import CONFIGS, write_checkpoint, write_config
from torch import nn

from mmdbb.blocks import DBB
from mmdbb.conv_norms import norm_names
from mmdbb.errors import UserError
from mmdbb.mm.backbones.absorbed import BlocksForConvNorm
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.pruning.penalty import KernelPenaltyHook
from mmdbb.mm.quantization.qat import QATHook  # noqa: F401
from mmdbb.mm.stock.config import stock_config
from mmdbb.stock_weights import stock_state

pytestmark = pytest.mark.usefixtures('quiet')

#: Backbones -> what they are once merged.
STOCK_BACKBONES = {
    'ResNetDBB': 'ResNet',
    'ResNetV1cDBB': 'ResNetV1c',
    'ResNetV1dDBB': 'ResNetV1d',
    'ResNeXtDBB': 'ResNeXt',
    'MobileNetV1DBB': 'MobileNetV1',
    'AlexNetDBB': 'PlainAlexNet',
    'VGGDBB': 'VGG',
    'ReparamRepVGG': 'RepVGG',
    'UniRepLKNet': 'PlainUniRepLKNet',
}
#: Hooks with nothing to do where no block is left.
OWN_HOOKS = (
    'BlocksHook',
    'BranchSharesHook',
    'DataCheckHook',
    'KernelPenaltyHook',
    'QATHook',
    'ReparamHook',
    'RepeatableHook',
)
#: Hooks in the place of another one.
HOOKS_IN_PLACE = dict(WholeCheckpointHook='CheckpointHook')


# The config


def mentions_ours(text):
    return [w for w in ('mmdbb', 'DBB', 'ACB', 'RepVGGConv') if w in text]


@pytest.mark.parametrize('task', CONFIGS)
def test_config_is_free_of_ours(task):
    cfg = Config.fromstring(CONFIGS[task], '.py')
    before = copy.deepcopy(cfg.to_dict())
    found = stock_config(cfg)
    found.pop('conv_cfg', None)  # a variable of the file's own
    assert not mentions_ours(found.pretty_text)
    assert cfg.to_dict() == before
    assert 'custom_imports' not in found
    assert found.load_from is None and found.resume is False
    assert not blocks_of(build_model(found))


def test_every_backbone_of_ours_is_known():
    ours = [
        name
        for name, kind in MMPRETRAIN_MODELS.module_dict.items()
        if isinstance(kind, type)
        and issubclass(kind, BlocksForConvNorm)
        and kind.__module__.startswith('mmdbb.')
    ]
    assert sorted(ours) == sorted(STOCK_BACKBONES)


@pytest.mark.parametrize('name', STOCK_BACKBONES)
def test_backbones_become_stock(name):
    cfg = Config(
        dict(
            model=dict(
                backbone=dict(
                    type=f'mmpretrain.{name}',
                    block=dict(type='DBB'),
                    deploy=False,
                    arch='A0',
                )
            )
        )
    )
    found = stock_config(cfg).model.backbone
    assert found.type.split('.')[-1] == STOCK_BACKBONES[name]
    added = dict(
        VGGDBB=dict(norm_cfg=dict(type='BN', requires_grad=True)),
        ReparamRepVGG=dict(deploy=True),
    )
    assert found == dict(type=found.type, arch='A0', **added.get(name, {}))


@pytest.mark.parametrize(
    'name, options',
    [
        ('ResNetDBB', dict(depth=18)),
        ('ResNetDBB', dict(depth=50, block=dict(type='OREPA'))),
        ('ResNetV1cDBB', dict(depth=50, drop_path_rate=0.1)),
        ('ResNetV1cDBB', dict(depth=18, out_indices=(2, 3))),
        ('ResNeXtDBB', dict(depth=50, groups=4)),
        ('ResNetDBB', dict(depth=18, stage_blocks=(1, 2, 1, 2))),
    ],
)
def test_dilated_as_in_mmseg(name, options):
    """Their first blocks are dilated less, which mmpretrain's never are."""
    backbone = dict(
        type=f'mmpretrain.{name}',
        base_channels=8,
        stem_channels=8,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        **options,
    )
    cfg = Config(dict(default_scope='mmseg', model=backbone))
    ours = randomize(build_model(cfg).double())
    merged = stock_config(cfg)
    stock = build_model(merged).double()
    if 'stage_blocks' in options:
        assert merged.model.type == 'mmpretrain.PlainResNet'
    else:
        assert type(stock).__module__.startswith('mmseg.')
    stock.load_state_dict(stock_state(ours, stock))
    x = image(2, 3, 37, 41)
    found, expected = stock(x), ours(x)
    assert len(found) == len(expected) == len(options.get('out_indices', '3'))
    for a, b in zip(found, expected):
        assert distance(a, b) < EXACT


def test_own_optimizer_rules_go():
    optimizer = dict(type='SGD', lr=0.1)
    rules = dict(
        optimizer=optimizer,
        constructor='ReparamOptimWrapperConstructor',
        paramwise_cfg=dict(custom_l2=True),
    )
    found = stock_config(Config(dict(optim_wrapper=rules)))
    assert found.optim_wrapper == dict(optimizer=optimizer)
    rules['constructor'] = 'Mine'
    found = stock_config(Config(dict(optim_wrapper=rules)))
    assert found.optim_wrapper == rules


def test_own_hooks_go():
    own = [dict(type='ReparamHook'), dict(type='mmengine.QATHook', begin=8)]
    own.append(dict(type=KernelPenaltyHook, weight=1e-5))
    assert 'custom_hooks' not in stock_config(Config(dict(custom_hooks=own)))
    others = [dict(type='EMAHook'), *own, dict(type='mine.ReparamHooks')]
    found = stock_config(Config(dict(custom_hooks=others)))
    assert [hook.type for hook in found.custom_hooks] == [
        'EMAHook',
        'mine.ReparamHooks',
    ]


def test_own_default_hooks_go():
    hooks = dict(deploy=dict(type='ReparamHook'), timer=dict(type='T'))
    found = stock_config(Config(dict(default_hooks=hooks)))
    assert list(found.default_hooks) == ['timer']


LAZY = """
from mmengine.config import read_base
from mmpretrain.models import (
    GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet)
from mmdbb.mm.backbones import ResNetDBB
from mmdbb.blocks import OREPAConv
from mmdbb.mm.engine.optim import ReparamOptimWrapperConstructor

default_scope = 'mmpretrain'
model = dict(
    type=ImageClassifier,
    backbone=BACKBONE,
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=3, in_channels=64))
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1),
    constructor=ReparamOptimWrapperConstructor)
"""


@pytest.mark.parametrize(
    'backbone',
    [
        'dict(type=ResNetDBB, depth=18, base_channels=8, stem_channels=8)',
        'dict(type=ResNet, depth=18, base_channels=8, stem_channels=8, '
        'conv_cfg=dict(type=OREPAConv))',
    ],
)
def test_a_config_of_classes(backbone, tmp_path):
    path = tmp_path / 'lazy.py'
    path.write_text(LAZY.replace('BACKBONE', backbone))
    found = stock_config(Config.fromfile(path))
    assert not mentions_ours(found.pretty_text)
    assert not blocks_of(build_model(found))
    checkpoint = write_checkpoint(path, tmp_path / 'trained.pth')
    result = deploy(
        Config.fromfile(path), checkpoint, str(tmp_path / 'out.pth')
    )
    assert 0 < result.difference.largest < 1e-4


def test_every_hook_of_ours_is_known():
    ours = [
        name
        for name, hook in HOOKS.module_dict.items()
        if hook.__module__.startswith('mmdbb.')
    ]
    assert sorted(ours) == sorted([*OWN_HOOKS, *HOOKS_IN_PLACE])
    for name in ours:
        found = stock_config(Config(dict(custom_hooks=[dict(type=name)])))
        hooks = [dict(type=HOOKS_IN_PLACE.get(name))]
        assert found.get('custom_hooks', [dict(type=None)]) == hooks


def test_a_hook_in_a_hosts_place_becomes_that_hook():
    whole = dict(type='WholeCheckpointHook', interval=2)
    found = stock_config(
        Config(
            dict(
                default_hooks=dict(checkpoint=whole, logger=None),
                custom_hooks=[whole, dict(type='EMAHook')],
            )
        )
    )
    plain = dict(type='CheckpointHook', interval=2)
    assert found.default_hooks.checkpoint == plain
    assert found.custom_hooks == [plain, dict(type='EMAHook')]
    hook = HOOKS.build(plain)
    assert type(hook).__name__ == 'CheckpointHook'


def test_only_our_convolutions_go():
    cfg = Config(
        dict(
            a=dict(conv_cfg=dict(type='mmengine.DBB')),
            b=[dict(conv_cfg=dict(type='DCNv2')), dict(conv_cfg=None)],
            c=(dict(conv_cfg=dict(type='ACB', gamma_init=1.0)),),
        )
    )
    found = stock_config(cfg)
    assert found.a.conv_cfg is None
    assert found.b[0].conv_cfg == dict(type='DCNv2')
    assert found.c[0].conv_cfg is None


def test_other_imports_stay():
    imports = ['mmdbb', 'mine', 'mmdbb.backbones', 'mmdbbx']
    cfg = Config(
        dict(
            custom_imports=dict(imports=imports, allow_failed_imports=False),
            load_from='a.pth',
            resume=True,
        )
    )
    found = stock_config(cfg)
    assert found.custom_imports == dict(
        imports=['mine', 'mmdbbx'], allow_failed_imports=False
    )
    assert found.load_from is None and found.resume is False
    one = Config(dict(custom_imports=dict(imports='mmdbb')))
    assert 'custom_imports' not in stock_config(one)


# The weights


def pair(norm_cfg, bias='auto', **options):
    """A ConvModule with a block, and the stock one."""
    arguments = dict(norm_cfg=norm_cfg, bias=bias, act_cfg=None, padding=1)
    block = ConvModule(
        4, 8, 3, conv_cfg=dict(type='DBB', **options), **arguments
    )
    return (
        randomize(block.double()).eval(),
        ConvModule(4, 8, 3, **arguments).double().eval(),
    )


X = image(2, 4, 5, 6)


@pytest.mark.parametrize(
    'norm_cfg, bias',
    [
        (dict(type='BN'), 'auto'),
        (dict(type='BN', eps=0.1), 'auto'),
        (dict(type='SyncBN'), 'auto'),
        (dict(type='BN', affine=False), 'auto'),
        (dict(type='BN'), True),
        (dict(type='GN', num_groups=2), True),
        (None, 'auto'),
    ],
)
def test_kept_norm(norm_cfg, bias):
    model, stock = pair(norm_cfg, bias)
    before = copy.deepcopy(model.state_dict())
    state = stock_state(model, stock)
    stock.load_state_dict(state, strict=True)
    assert distance(stock(X), model(X)) < EXACT
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_merged_bias_folds_into_the_mean():
    model, stock = pair(dict(type='BN'))
    state = stock_state(model, stock)
    _, bias = model.conv.get_equivalent_kernel_bias()
    expected = model.bn.running_mean - bias
    assert distance(state['bn.running_mean'], expected) < EXACT
    assert set(state) == set(stock.state_dict())


def test_bias_without_a_place():
    model, stock = pair(dict(type='GN', num_groups=2), bias=False)
    with pytest.raises(
        UserError,
        match='bias of the merged conv has no place in the stock network: its '
        'convolution has none, and gn behind it is of type GroupNorm, which '
        'keeps no running mean',
    ):
        stock_state(model, stock)


@pytest.mark.parametrize(
    'norm_cfg',
    [dict(type='IN'), dict(type='BN', track_running_stats=False)],
)
def test_bias_that_the_norm_removes(norm_cfg):
    """It subtracts the mean of each channel, and with it the bias."""
    model, stock = pair(norm_cfg, bias=False)
    stock.load_state_dict(stock_state(model, stock), strict=True)
    bias = model.conv.get_equivalent_kernel_bias().bias
    assert bias.abs().min() > 1e-3
    assert distance(stock(X), model(X)) < EXACT


def test_bias_without_a_norm():
    model, stock = pair(None, bias=False)
    with pytest.raises(UserError, match='no norm alone reads its output'):
        stock_state(model, stock)


def absorbed(eps=1e-5, affine=True):
    cfg = dict(type='BN', eps=eps, affine=affine)
    model, stock = pair(cfg)
    model.bn = nn.Identity()
    return model, stock


@pytest.mark.parametrize('eps', [1e-5, 0.1])
def test_absorbed_norm(eps):
    model, stock = absorbed(eps)
    state = stock_state(model, stock)
    stock.load_state_dict(state, strict=True)
    assert distance(stock(X), model(X)) < EXACT
    # Weight 1, bias b, mean 0, variance 1 - eps.
    _, bias = model.conv.get_equivalent_kernel_bias()
    assert distance(state['bn.bias'], bias) < EXACT
    assert state['bn.weight'].unique().tolist() == [1]
    assert state['bn.running_mean'].unique().tolist() == [0]
    assert state['bn.running_var'].unique().tolist() == [1 - eps]
    assert state['bn.num_batches_tracked'].item() == 0
    assert state['bn.num_batches_tracked'].dtype == torch.int64


def test_absorbed_norm_without_a_bias():
    """It subtracts a mean of minus the bias instead."""
    model, stock = absorbed(affine=False)
    stock.load_state_dict(stock_state(model, stock), strict=True)
    assert distance(stock(X), model(X)) < EXACT
    _, bias = model.conv.get_equivalent_kernel_bias()
    assert distance(stock.bn.running_mean, -bias) < EXACT


def test_float32_variance_keeps_the_weights():
    """1 - eps in float32: off by no more than a rounding."""
    model, stock = absorbed()
    model, stock = model.float(), stock.float()
    stock.load_state_dict(stock_state(model, stock))
    assert distance(stock(X.float()), model.double()(X)) < 1e-5


def test_model_without_blocks():
    with pytest.raises(ValueError, match='no block to merge'):
        stock_state(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize('kind', ['mmpretrain', 'mmdet', 'mmseg'])
def test_resnets_by_conv_cfg(kind):
    cfg = dict(
        type=f'{kind}.ResNet', depth=18, base_channels=8, stem_channels=8
    )
    model = MODELS.build(dict(cfg, conv_cfg=dict(type='DBB')))
    stock = MODELS.build(cfg)
    model, stock = randomize(model.double()), stock.double()
    stock.load_state_dict(stock_state(model, stock), strict=True)
    model.train(False)
    stock.train(False)
    x = image(1, 3, 32, 48)
    assert distance(stock(x)[-1], model(x)[-1]) < EXACT
    assert norm_names(stock) == norm_names(model)


def test_a_shared_block_gives_its_bias_everywhere():
    block = DBB(4, 4, 3, padding=1)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(block, nn.ReLU(), block)
    stock = nn.Sequential(conv, nn.ReLU(), conv).double().eval()
    model = randomize(model.double()).eval()
    stock.load_state_dict(stock_state(model, stock), strict=True)
    assert distance(stock(X), model(X)) < EXACT


# Where mmdbb is not installed

LOAD = """
import sys


class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'mmdbb':
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Forbidden())

import logging
logging.disable(logging.WARNING)
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

for task in sys.argv[1:]:
    cfg = Config.fromfile(f'{task}/out.py')
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.train(False)
    loaded = torch.load(f'{task}/out.pth', weights_only=True)
    model.load_state_dict(loaded['state_dict'], strict=True)
    with torch.no_grad():
        y = model.extract_feat(torch.load('x.pt'))
    torch.save(y, f'{task}/y.pt')
assert not any(name.startswith('mmdbb') for name in sys.modules)
"""


def test_stock_files_load_where_mmdbb_is_not(tmp_path):
    x = image(2, 3, 64, 48, dtype=torch.float32)
    torch.save(x, tmp_path / 'x.pt')
    expected = {}
    for task in CONFIGS:
        folder = tmp_path / task
        folder.mkdir()
        config = write_config(folder, task)
        cfg = Config.fromfile(config)
        checkpoint = write_checkpoint(config, folder / 'trained.pth')
        trained = build_model(cfg)
        trained.load_state_dict(torch.load(checkpoint)['state_dict'])
        expected[task] = trained.extract_feat(x)
        out = str(folder / 'out.pth')
        deploy(cfg, checkpoint, out, image_size=(64, 48))
    (tmp_path / 'load.py').write_text(LOAD)
    run = subprocess.run(
        [sys.executable, 'load.py', *CONFIGS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for task, features in expected.items():
        found = torch.load(tmp_path / task / 'y.pt')
        assert len(found) == len(features)
        for a, b in zip(found, features):
            assert distance(a, b) < 1e-4
