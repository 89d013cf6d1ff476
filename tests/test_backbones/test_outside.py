"""Backbones that are defined outside of mmdbb train, merge and say so."""

import sys

import pytest
import torch
from helpers import distance, image, randomize, run_tool
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from runs import run_config, train
from torch import nn

from mmdbb.blocks import ACB, DBB, RepVGGConv
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.mm.backbones.absorbed import BlocksForConvNorm
from mmdbb.mm.config_types import class_of, type_of
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.quantization.insert_bn import conv_bn_config
from mmdbb.mm.stock.config import stock_config
from mmdbb.plain.weights import load_plain_weights_
from mmdbb.reparam import find_blocks

pytestmark = pytest.mark.usefixtures('quiet')

#: Subclasses of stock backbones; nothing here is needed once they are merged.
OF_STOCK = """
from mmdet.models import ResNet
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmseg.models.backbones import ResNetV1c
from mmseg.registry import MODELS as MMSEG_MODELS

from mmdbb.mm.backbones import BlocksForConvNorm


@MMDET_MODELS.register_module()
class OutsideResNet(BlocksForConvNorm, ResNet):
    pass


@MMSEG_MODELS.register_module()
class OutsideResNetV1c(BlocksForConvNorm, ResNetV1c):
    default_block = dict(type='ACB')


@HOOKS.register_module()
class OutsideHook(Hook):
    pass
"""
#: A network of one's own, plain and with blocks.
OF_OWN = """
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.registry import MODELS
from torch import nn

from mmdbb.mm.backbones import BlocksForConvNorm


@MODELS.register_module()
class OutsideSmall(nn.Module):
    conv_norm_names = (('first', 'after_first'), ('second', 'after_second'))
    stem_names = ('first', 'after_first')

    def __init__(self, width=8, conv_cfg=None, norm_cfg=None):
        super().__init__()
        norm_cfg = norm_cfg or dict(type='BN')
        self.first = build_conv_layer(
            conv_cfg, 3, width, 3, 2, 1, bias=False)
        self.after_first = build_norm_layer(norm_cfg, width)[1]
        self.second = build_conv_layer(
            conv_cfg, width, width, 3, padding=1, bias=False)
        self.after_second = build_norm_layer(norm_cfg, width)[1]

    def forward(self, x):
        x = self.after_first(self.first(x)).relu()
        return (self.after_second(self.second(x)).relu(),)


@MODELS.register_module()
class OutsideSmallBlocks(BlocksForConvNorm, OutsideSmall):
    default_block = dict(type='RepVGGConv')
"""
NARROW = dict(
    depth=18,
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(1,),
    base_channels=8,
    stem_channels=8,
)
#: Backbone -> its options, module and block, and the type once merged.
CASES = {
    'mmdet.OutsideResNet': (
        dict(NARROW, norm_eval=False),
        'outside_stock',
        DBB,
        'mmdet.ResNet',
    ),
    'mmseg.OutsideResNetV1c': (
        dict(NARROW, norm_cfg=dict(type='BN')),
        'outside_stock',
        ACB,
        'mmseg.ResNetV1c',
    ),
    'OutsideSmallBlocks': (
        dict(width=16),
        'outside_own',
        RepVGGConv,
        'OutsideSmall',
    ),
}


def registries(root):
    yield root
    for child in root.children.values():
        yield from registries(child)


@pytest.fixture(scope='module', autouse=True)
def modules(tmp_path_factory):
    """Two modules that a config can import; gone again after the tests."""
    folder = tmp_path_factory.mktemp('modules')
    texts = dict(outside_stock=OF_STOCK, outside_own=OF_OWN)
    for name, text in texts.items():
        (folder / f'{name}.py').write_text(text)
    sys.path.insert(0, str(folder))
    for name in texts:
        __import__(name)
    yield
    sys.path.remove(str(folder))
    for name in texts:
        del sys.modules[name]
    for registry in [*registries(MODELS), *registries(HOOKS)]:
        for name, kind in list(registry.module_dict.items()):
            if getattr(kind, '__module__', None) in {*texts, __name__}:
                del registry.module_dict[name]


def config_of(name, work_dir):
    options, module, _, _ = CASES[name]
    cfg = run_config(work_dir, scores=(1.0,))
    cfg.custom_imports.imports = ['mmdbb', module, 'runs']
    cfg.model.backbone = dict(type=name, **options)
    return cfg


def merged_config(backbone, **fields):
    return stock_config(Config(dict(model=dict(backbone=backbone), **fields)))


@pytest.mark.parametrize('name', CASES)
def test_trains_and_merges_to_its_plain_network(name, tmp_path):
    _, module, block, plain_type = CASES[name]
    cfg = config_of(name, tmp_path / 'work')
    runner = train(cfg)
    assert runner.iter == 2
    blocks = find_blocks(runner.model)
    assert {type(b) for b in blocks.values()} == {block}
    cfg.dump(tmp_path / 'config.py')
    checkpoint = tmp_path / 'work' / 'epoch_1.pth'
    out = tmp_path / 'out.pth'
    size = ('--image-size', 32, 24)
    config = tmp_path / 'config.py'
    assert run_tool('reparam', config, checkpoint, out, *size) == 0

    found = Config.fromfile(tmp_path / 'out.py')
    assert found.model.backbone.type == plain_type
    assert not {'block', 'deploy'} & set(found.model.backbone)
    # The module is imported only where the plain network is in it.
    needed = [module] if module == 'outside_own' else []
    assert found.custom_imports.imports == [*needed, 'runs']
    plain = build_model(found)
    assert type_of(type(plain.backbone)) == plain_type
    assert not find_blocks(plain)
    plain.load_state_dict(torch.load(out)['state_dict'], strict=True)

    trained = build_model(cfg)
    trained.load_state_dict(read_checkpoint(str(checkpoint))['state_dict'])
    x = image(2, 3, 32, 24, dtype=torch.float32)
    expected = trained.extract_feat(x)[-1]
    assert expected.std() > 0
    assert distance(plain.extract_feat(x)[-1], expected) < 1e-4


@pytest.mark.parametrize('name', CASES)
def test_norms_stand_where_no_block_has_some(name):
    """OREPA leaves the norms alone; merged they are where they were."""
    options, _, block, _ = CASES[name]
    absorbing = MODELS.build(dict(type=name, **options))
    assert blocks_and_identities(absorbing)[1]
    kept = MODELS.build(dict(type=name, block=dict(type='OREPA'), **options))
    blocks, identities = blocks_and_identities(kept)
    assert blocks and not identities
    plain = MODELS.build(dict(type=name, deploy=True, **options))
    assert not find_blocks(plain)


def blocks_and_identities(model):
    identities = [m for m in model.modules() if isinstance(m, nn.Identity)]
    return find_blocks(model), identities


@pytest.mark.parametrize('name', CASES)
def test_starts_from_plain_weights(name, tmp_path):
    options, _, _, plain_type = CASES[name]
    plain = randomize(MODELS.build(dict(type=plain_type, **options)))
    path = str(tmp_path / 'plain.pth')
    torch.save(plain.state_dict(), path)
    if name == 'OutsideSmallBlocks':  # it takes no init_cfg
        model = MODELS.build(dict(type=name, **options))
        load_plain_weights_(model, path)
    else:
        rule = dict(type='PlainPretrained', checkpoint=path)
        model = MODELS.build(dict(type=name, init_cfg=rule, **options))
        model.init_weights()
    plain.eval()
    x = image(2, 3, 32, 24, dtype=torch.float32)
    assert distance(model.eval()(x)[-1], plain(x)[-1]) < 1e-4


def test_merges_partly(tmp_path):
    """The rest stay blocks, so the network stays the user's own."""
    cfg = config_of('mmdet.OutsideResNet', tmp_path / 'work')
    model = randomize(build_model(cfg))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    cfg.dump(tmp_path / 'a.py')
    options = ('--only', '*layer1*', '--image-size', 32, 24)
    code = run_tool(
        'reparam',
        *(tmp_path / name for name in ('a.py', 'a.pth', 'b.pth')),
        *options,
    )
    assert code == 0
    found = Config.fromfile(tmp_path / 'b.py')
    assert found.model.backbone.type == 'mmdet.OutsideResNet'
    assert found.custom_imports.imports == ['mmdbb', 'outside_stock', 'runs']


@pytest.mark.parametrize(
    'type_, fields',
    [
        ('OutsideResNet', dict(default_scope='mmdet')),
        ('mmdet.OutsideResNet', dict(default_scope='mmseg')),
        ('outside_stock.OutsideResNet', dict(default_scope='mmseg')),
        ('OutsideResNet', dict()),
    ],
)
def test_types_are_found_as_mmengine_finds_them(type_, fields):
    found = merged_config(dict(type=type_, depth=18), **fields)
    assert found.model.backbone == dict(type='mmdet.ResNet', depth=18)


def test_a_scope_inside_of_a_config():
    inner = dict(type='OutsideResNet', depth=18)
    found = merged_config(dict(inner, _scope_='mmdet'), default_scope='mmseg')
    assert found.model.backbone.type == 'mmdet.ResNet'
    found = merged_config(inner, default_scope='mmseg')
    assert found.model.backbone == inner  # mmseg has no such backbone


def test_a_class_in_place_of_its_name():
    kind = class_of('mmdet.OutsideResNet')
    found = merged_config(dict(type=kind, depth=18, deploy=True))
    assert found.model.backbone == dict(type='mmdet.ResNet', depth=18)


@pytest.mark.parametrize('type_', ['Nobodys', 'mmdet.Nobodys', 'no.body.Net'])
def test_types_of_nobody_stay(type_):
    backbone = dict(type=type_, block=dict(type='DBB'), depth=18)
    assert merged_config(backbone).model.backbone == backbone


def test_values_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / 'not_for_import.py').write_text('raise SystemExit')
    monkeypatch.syspath_prepend(str(tmp_path))
    merged_config(
        dict(type='mmdet.OutsideResNet', depth=18),
        custom_imports=dict(imports=['outside_stock']),
        work_dir='not_for_import.py',
    )


def test_an_import_stays_while_it_is_needed():
    backbone = dict(type='mmdet.OutsideResNet', depth=18)
    both = ['outside_stock', 'mine']
    fields = dict(
        custom_imports=dict(imports=both, allow_failed_imports=False)
    )
    found = merged_config(backbone, **fields)
    assert found.custom_imports.imports == ['mine']
    hooks = [dict(type='OutsideHook')]
    found = merged_config(backbone, custom_hooks=hooks, **fields)
    assert found.custom_imports.imports == both
    # What the import of an import brings is not known to be there without.
    own = dict(type='OutsideSmall')
    found = merged_config(backbone, head=own, **fields)
    assert found.custom_imports.imports == both
    # Where no backbone was merged, all imports stay.
    found = merged_config(dict(type='mmdet.ResNet', depth=18), **fields)
    assert found.custom_imports.imports == both


class Unregistered(nn.Module):
    def __init__(self, conv_cfg=None, norm_cfg=None):
        super().__init__()


class Lost(BlocksForConvNorm, Unregistered):
    pass


class Found(Lost):
    @classmethod
    def plain_cfg(cls, cfg):
        return dict(type='mmdet.ResNet', depth=cfg['depth'])


def test_says_how_to_say_what_it_is_once_merged():
    with pytest.raises(UserError, match='what Lost is .* Lost a classmethod'):
        merged_config(dict(type=Lost))
    found = merged_config(dict(type=Found, depth=50))
    assert found.model.backbone == dict(type='mmdet.ResNet', depth=50)


def test_the_deploy_tool_says_so_too(tmp_path, capsys):
    name = 'OutsideLost'
    small = class_of('OutsideSmall')
    MODELS.register_module(
        name=name, module=type(name, (BlocksForConvNorm, small), {})
    )
    del MODELS.module_dict['OutsideSmall']
    try:
        cfg = config_of('OutsideSmallBlocks', tmp_path / 'work')
        cfg.model.backbone.type = name
        cfg.dump(tmp_path / 'a.py')
        state = randomize(build_model(cfg)).state_dict()
        torch.save(dict(state_dict=state), tmp_path / 'a.pth')
        code = run_tool(
            'reparam', *(tmp_path / n for n in ('a.py', 'a.pth', 'b.pth'))
        )
    finally:
        MODELS.register_module(name='OutsideSmall', module=small)
    assert code and 'OutsideLost' in str(code) + capsys.readouterr().err
    assert not (tmp_path / 'b.pth').exists()


def test_norms_are_inserted_for_its_default_block():
    cfg = Config(dict(model=dict(type='mmseg.OutsideResNetV1c', depth=18)))
    model = MODELS.build(cfg.model)
    assert conv_bn_config(cfg, model).model.block.type == 'ConvBN'


def test_its_stem_is_what_it_says():
    from mmengine.optim import build_optim_wrapper

    model = nn.Module()
    model.backbone = MODELS.build(dict(type='OutsideSmallBlocks'))
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1),
            constructor='ReparamOptimWrapperConstructor',
            paramwise_cfg=dict(stem_lr_mult=0.5),
        ),
    )
    groups = wrapper.optimizer.param_groups
    slow, fast = sorted(groups, key=lambda group: group['lr'])
    stem = {id(p) for p in model.backbone.first.parameters()}
    assert {id(p) for p in slow['params']} == stem
    assert (slow['lr'], fast['lr']) == (0.05, 0.1)
