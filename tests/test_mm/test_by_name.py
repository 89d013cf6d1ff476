"""Blocks chosen by the names of layers, in a config of type WithBlocks."""

import copy
import math
import pickle
from pathlib import Path

import mmdet
import mmpretrain
import mmpretrain.registry
import pytest
import torch
from helpers import EXACT, deploy, distance, image, randomize, run_tool
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS, init_default_scope
from networks import CONFIGS, write_checkpoint
from runs import run_config, train
from torch import nn

from mmdbb import ACB, DBB, OREPAConv, load_deployed
from mmdbb.by_name import put_blocks_
from mmdbb.deploy import Proof, Source, drop_branches_checkpoint, stock_config
from mmdbb.errors import UserError
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.deploy.parts import parts_of, refuse_no_block
from mmdbb.mm.engine.blocks_hook import BlocksHook
from mmdbb.reparam import find_blocks

pytestmark = pytest.mark.usefixtures('quiet')
RULES = [
    dict(type='ACB', only='backbone.layer1.0.*'),
    dict(type='Conv2d', only=['backbone.layer1.*']),
    dict(type='OREPA', only='backbone.layer2.*', skip='*.downsample.*'),
]


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, padding=3),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
        nn.Conv2d(8, 8, 5, bias=False, groups=2, padding_mode='reflect'),
        nn.Conv2d(8, 4, 1),
        nn.ConvTranspose2d(4, 4, 3),
    )


def kinds(model):
    return {n: type(b).__name__ for n, b in find_blocks(model).items()}


def config(task='classifier', rules=RULES, **changes):
    """A stock network of a task, with blocks chosen by name."""
    cfg = stock_config(Config.fromstring(CONFIGS[task], '.py'))
    network = cfg.model.type
    cfg.merge_from_dict(
        dict(
            custom_imports=dict(imports=['mmdbb'], allow_failed_imports=False),
            model=dict(type='WithBlocks', network=network, **changes),
        )
    )
    cfg.model.blocks = rules
    return cfg


# In a network, in plain torch


def test_the_first_rule_decides():
    model = net()
    found = put_blocks_(
        model,
        [
            dict(type='ACB', only=['1.*', '3'], skip='3'),
            dict(type='OREPA', only='0', min_kernel_size=7),
            dict(type='DBB', skip='4', norm_cfg=dict(type='BN', eps=1e-3)),
        ],
    )
    assert found == {'0': 'OREPAConv', '1.0': 'ACB', '2': 'DBB'}
    assert kinds(model) == found
    assert type(model[3]) is nn.Conv2d  # a 1x1, as under conv_cfg
    assert model[2].branches['kxk'].norm.eps == 1e-3
    spec = model[2].spec
    assert (spec.groups, spec.padding_mode) == (2, 'reflect')
    assert model[2].kernel_size == (5, 5) and not model[2]._wants_bias
    assert model(torch.rand(2, 3, 12, 11)).shape == (2, 4, 8, 7)


def test_layers_keep_what_they_had():
    model = net().double().to(memory_format=torch.channels_last).eval()
    model[2].requires_grad_(False)
    put_blocks_(model, [dict(type='DBB')])
    for name in ('1.0', '2'):
        block = model.get_submodule(name)
        kernel = block.branches['kxk'].conv.weight
        assert kernel.dtype == torch.float64 and not block.training
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        trained = {p.requires_grad for p in block.parameters()}
        assert trained == {name == '1.0'}


def test_a_layer_in_two_places_stays_one():
    conv = nn.Conv2d(4, 4, 3)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    assert put_blocks_(model, [dict(type='DBB', only='2')]) == {'0': 'DBB'}
    assert model[0] is model[2] and isinstance(model[0], DBB)


def test_blocks_give_way_to_others():
    model = nn.Sequential(DBB(4, 4, 3), OREPAConv(4, 4, 3, bias=False))
    found = put_blocks_(
        model, [dict(type='Conv2d', only='0'), dict(type='ACB')]
    )
    assert found == {'0': 'Conv2d', '1': 'ACB'}
    assert type(model[0]) is nn.Conv2d and model[0].bias is not None
    assert not model[1]._wants_bias


def sounds_and_clips():
    return nn.ModuleDict(
        dict(
            sound=nn.Conv1d(4, 8, 5, stride=2, groups=2, bias=False),
            clip=nn.Conv3d(4, 8, (1, 3, 3), dilation=(1, 2, 1)),
            up=nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1),
            picture=nn.Conv2d(4, 8, 3),
        )
    )


def test_layers_of_other_kinds_get_their_forms():
    plain, model = sounds_and_clips(), sounds_and_clips()
    rules = [dict(type='ACB', skip='sound'), dict(type='DBB')]
    found = put_blocks_(model, rules)
    assert found == kinds(model)
    assert found == dict(  # ACB has no form for two of them
        sound='DBB1d', clip='ACB3d', up='DBBTranspose2d', picture='ACB'
    )
    for name, size in (('sound', [19]), ('clip', [2, 9, 8]), ('up', [5, 4])):
        x = torch.rand(2, 4, *size)
        assert model[name](x).shape == plain[name](x).shape
        assert plain[name].state_dict().keys() >= {'weight'}
        assert model[name]._wants_bias is (name != 'sound')
    # They give way to others in turn, each in its own form.
    changed = put_blocks_(
        model, [dict(type='Conv2d', only='[su]*'), dict(type='RepVGGConv')]
    )
    assert changed['clip'] == 'RepVGGConv3d'
    for name in ('sound', 'up'):
        assert repr(model[name]) == repr(plain[name])


def test_a_form_is_for_its_own_kind():
    model = sounds_and_clips()
    assert put_blocks_(model, [dict(type='DBB3d')]) == {'clip': 'DBB3d'}
    with pytest.raises(UserError, match='it has no form for them'):
        put_blocks_(model, [dict(type='ACB', only='sound')])


def test_padding_by_the_image_is_kept():
    model = nn.Sequential(Conv2dAdaptivePadding(3, 4, 3, stride=2))
    put_blocks_(model, [dict(type='DBB')])
    assert model[0].adaptive_padding
    assert model(torch.rand(1, 3, 9, 8)).shape == (1, 4, 5, 4)


def test_layers_that_stay():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(2, 2, 3) for _ in range(3))
            self.held = [self.a]  # it would go on calling this one
            self.b.register_forward_hook(lambda *_: None)

    model = Held()
    assert put_blocks_(model, [dict(type='DBB')]) == {'c': 'DBB'}
    with pytest.raises(UserError, match=r"blocks\[0\].only: 'a' fits no"):
        put_blocks_(model, [dict(type='DBB', only='a')])


@pytest.mark.parametrize(
    ('rules', 'error', 'message'),
    [
        (None, TypeError, 'blocks must be a list of configs'),
        ([], TypeError, 'blocks must be a list of configs'),
        (dict(type='DBB'), TypeError, 'blocks must be a list of configs'),
        (['DBB'], TypeError, r'blocks\[0\] must be a config with a type'),
        ([dict(only='1')], TypeError, r'blocks\[0\] must be a config with a'),
        ([dict(type='DBB', only=[1])], TypeError, 'only must be shell patt'),
        ([dict(type='DBB', foo=1)], TypeError, r"unknown keys \['foo'\]"),
        ([dict(type='Conv2d', bias=1)], TypeError, 'leaves a layer plain'),
        (
            [dict(type='DBB', max_kernel_size='7')],
            TypeError,
            r'blocks\[0\].max_kernel_size must be a number',
        ),
        ([dict(type='DBBB')], ValueError, "got type='DBBB'; allowed: .*ACB"),
        (
            [dict(type='DBB', only='layer9.*')],
            UserError,
            r"blocks\[0\].only: 'layer9\.\*' fits no convolution; they are",
        ),
        (
            [dict(type='DBB', skip=['0', '9'])],
            UserError,
            r"blocks\[0\].skip: '9' fits no",
        ),
        (
            [dict(type='DBB'), dict(type='ACB', only='1.0')],
            UserError,
            r'blocks\[1\] decides for no convolution',
        ),
        (
            [dict(type='DBB', only='3')],
            UserError,
            r'blocks\[0\] decides for no convolution: .* of 2 to 6 taps',
        ),
        (
            [
                dict(
                    type='DBB',
                    branches=['identity'],
                    only='0',
                    max_kernel_size=9,
                )
            ],
            UserError,
            "^0: branch 'identity' needs",
        ),
    ],
)
def test_wrong_rules(rules, error, message):
    model = net()
    with pytest.raises(error, match=message):
        put_blocks_(model, rules)
    assert not find_blocks(model)


def test_a_network_without_convolutions():
    for model in (nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(UserError, match='has no convolution inside'):
            put_blocks_(model, [dict(type='DBB')])


# What the network set on purpose


class Starts(nn.Module):
    """Layers that a host gave a start of their own, as it is built."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3, padding=1)
        self.fixed = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.fixed.weight.requires_grad_(False)
        self.prior = nn.Conv2d(3, 4, 3, padding=1)
        nn.init.constant_(self.prior.bias, -4.6)
        self.offsets = nn.Conv2d(3, 4, 3, padding=1)
        nn.init.zeros_(self.offsets.weight)
        self.tied = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.same = nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False)
        self.same.weight = self.tied.weight


@pytest.mark.parametrize('block', ['DBB', 'OREPA', 'RepVGGConv'])
def test_what_a_network_set_on_purpose_stays(block):
    model = Starts().double().eval()
    expected = {n: m(image(2, 3, 9, 9)) for n, m in model.named_children()}
    stay = ['offsets', 'tied', 'same']
    found = put_blocks_(model, [dict(type=block)])
    assert [*found] == ['plain', 'fixed', 'prior']
    model.eval()
    for name in ('fixed', 'prior', *stay):
        y = model.get_submodule(name)(image(2, 3, 9, 9))
        assert distance(y, expected[name]) < 1e-5, name
    y = model.plain(image(2, 3, 9, 9))
    assert distance(y, expected['plain']) > 0.1
    assert not any(p.requires_grad for p in model.fixed.parameters())
    assert all(p.requires_grad for p in model.prior.parameters())
    for name in stay:
        with pytest.raises(UserError, match=f"'{name}' fits no convolution"):
            put_blocks_(Starts(), [dict(type=block, only=name)])


def retinanet(kind):
    """RetinaNet of the package, with blocks wherever they fit."""
    cfg = Config.fromfile(
        str(
            Path(mmdet.__file__).parent
            / '.mim/configs/retinanet/retinanet_r18_fpn_1x_coco.py'
        )
    )
    model = dict(cfg.model, type='WithBlocks', network='RetinaNet')
    model['backbone'] = dict(
        cfg.model.backbone, init_cfg=None, base_channels=4
    )
    model['neck'] = dict(cfg.model.neck, in_channels=[4, 8, 16, 32])
    return dict(model, blocks=[dict(type=kind)])


@pytest.mark.parametrize('block', ['DBB', 'OREPA', 'ACB'])
def test_a_detectors_prior_stays(block):
    """Of all anchors few show an object; without it the loss is 100 times."""
    init_default_scope('mmdet')
    model = MODELS.build(retinanet(block))
    assert 'bbox_head.retina_cls' in find_blocks(model)
    copied = pickle.loads(pickle.dumps(model))  # init_weights goes with it
    for each in (model, copied):
        each.init_weights()
        each.train()
        last = each.bbox_head.retina_cls
        shares = last(torch.zeros(2, 256, 5, 5)).sigmoid()
        assert shares.mean().item() == pytest.approx(0.01, abs=1e-3)
        if block == 'OREPA':  # whose other layers may give anything
            y = last(image(2, 256, 9, 9).float())
            assert 0.1 < y.std() < 0.5  # of a kernel of deviation 0.01
            continue
        scores, _ = each(image(2, 3, 64, 64).float(), mode='tensor')[-2:]
        shares = torch.cat([s.sigmoid().flatten() for s in scores])
        assert 0.005 < shares.mean() < 0.05


@pytest.mark.parametrize('block', ['DBB', 'OREPA'])
def test_a_host_may_write_into_layers_that_are_blocks(block):
    """YOLOF's head writes each layer; DCN starts its offsets as zero."""
    init_default_scope('mmdet')
    head = dict(
        type='WithBlocks',
        network='YOLOFHead',
        blocks=[dict(type=block)],
        num_classes=3,
        in_channels=8,
        num_cls_convs=1,
        num_reg_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator', ratios=[1.0], scales=[2], strides=[32]
        ),
    )
    model = MODELS.build(head)
    blocks = find_blocks(model)
    model.init_weights()
    assert find_blocks(model) == blocks
    assert {'cls_score', 'bbox_pred', 'object_pred'} <= {*blocks}
    prior = -math.log(99)
    y = model.cls_score(torch.zeros(2, 8, 5, 5))
    assert y.mean().item() == pytest.approx(prior, abs=0.01)
    with pytest.raises((AttributeError, ValueError)):  # after it as before
        model.cls_score.weight.data.zero_()

    dcn = dict(type='DCNv2', deform_groups=1, fallback_on_stride=False)
    backbone = dict(
        type='WithBlocks',
        network='mmdet.ResNet',
        blocks=[dict(type=block)],
        depth=50,
        base_channels=4,
        stem_channels=4,
        dcn=dcn,
        stage_with_dcn=(False, False, True, True),
    )
    model = MODELS.build(backbone)
    model.init_weights()
    offsets = [m for n, m in model.named_modules() if 'conv_offset' in n]
    assert offsets and all(type(m) is nn.Conv2d for m in offsets)
    assert not any(m.weight.any() for m in offsets)


class ZeroLast(BaseModule):
    """Starts a layer as zero when it is initialised, not when it is built."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(3, 4, 3)

    def init_weights(self):
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)


def test_a_start_that_a_block_cannot_have_is_refused():
    rules = dict(type='WithBlocks', network=ZeroLast)
    model = MODELS.build(dict(rules, blocks=[dict(type='DBB')]))
    with pytest.raises(ValueError, match="last: ZeroLast .* skip='last'"):
        model.init_weights()


# In a config


@pytest.mark.parametrize('task', CONFIGS)
def test_the_stock_network_comes_out(task, tmp_path):
    cfg = config(task)
    stock = stock_config(Config.fromstring(CONFIGS[task], '.py'))
    path = str(tmp_path / 'config.py')
    cfg.dump(path)
    model = build_model(cfg)
    found = kinds(model)
    assert set(found.values()) == {'ACB', 'OREPAConv'}
    assert not any(n.startswith('backbone.layer1.1') for n in found)
    checkpoint = write_checkpoint(path, tmp_path / 'trained.pth')
    result = deploy(
        Config.fromfile(path),
        checkpoint,
        tmp_path / 'out.pth',
        image_size=(64, 48),
    )
    assert result.blocks == len(found) and not result.left
    written = Config.fromfile(result.config)
    assert written.model.type.split('.')[-1] == stock.model.type.split('.')[-1]
    assert 'custom_imports' not in written or 'mmdbb' not in str(
        written.custom_imports
    )
    plain = build_model(stock)
    plain.load_state_dict(torch.load(result.checkpoint)['state_dict'])


def test_a_base_of_the_package_is_inherited(tmp_path):
    """Only two keys are new; all others stay where they are."""
    path = tmp_path / 'config.py'
    path.write_text(
        "_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'\n"
        "custom_imports = dict(imports=['mmdbb'])\n"
        "model = dict(type='WithBlocks', network='ImageClassifier',\n"
        '    backbone=dict(base_channels=8, stem_channels=8),\n'
        '    head=dict(in_channels=64),\n'
        "    blocks=[dict(type='DBB', only='backbone.layer[34].*')])\n"
    )
    model = mmpretrain.get_model(str(path))
    assert type(model).__name__ == 'ImageClassifier'
    assert len(find_blocks(model)) == 8
    assert model.backbone.conv1.out_channels == 8
    # A package's own registry leaves no default scope.
    cfg = Config.fromfile(path).model
    again = mmpretrain.registry.MODELS.build(copy.deepcopy(cfg))
    assert kinds(again) == kinds(model)
    with pytest.raises(KeyError, match="'Nobodys' of WithBlocks is in no"):
        MODELS.build(dict(cfg, network='Nobodys'))
    with pytest.raises(ValueError, match='WithBlocks: blocks.0..only'):
        MODELS.build(dict(cfg, blocks=[dict(type='DBB', only='x')]))


def test_ready_backbones_take_other_blocks():
    """The norms stay absorbed, by the block that is there now."""
    cfg = Config.fromstring(CONFIGS['classifier'], '.py')
    cfg.model.update(
        type='WithBlocks',
        network='ImageClassifier',
        blocks=[dict(type='ACB', only='backbone.layer2.*')],
    )
    model = build_model(cfg)
    layer = model.backbone.layer2[1]
    assert type(layer.conv2) is ACB
    assert layer.bn2.block is layer.conv2
    assert layer.conv2.branches['kxk'].norm_cfg == dict(
        type='BN', requires_grad=True
    )
    assert type(model.backbone.layer1[0].conv1) is DBB
    wrong = copy.deepcopy(cfg)
    wrong.model.blocks[0].type = 'OREPA'
    with pytest.raises(UserError, match='has no norm to do so'):
        build_model(wrong)


def test_trained_resumed_and_averaged(tmp_path):
    """The optimizer has the blocks' parameters, a plain start loads."""
    start = build_model(stock_config(config()))
    torch.save(dict(state_dict=start.state_dict()), tmp_path / 'plain.pth')
    cfg = run_config(tmp_path / 'a')
    new = config()
    new.model.init_cfg = dict(
        type='PlainPretrained', checkpoint=str(tmp_path / 'plain.pth')
    )
    cfg.model, cfg.custom_imports = new.model, new.custom_imports
    runner = train(copy.deepcopy(cfg))
    model = runner.model
    assert kinds(model) == kinds(build_model(config()))
    known = {p for g in runner.optim_wrapper.param_groups for p in g['params']}
    assert {*model.parameters()} <= known
    cfg.resume, cfg.train_cfg.max_epochs = True, 2
    last = torch.load(tmp_path / 'a/epoch_2.pth', weights_only=False)
    averaged = [n for n in last['ema_state_dict'] if '.branches.kx1.' in n]
    assert averaged
    again = train(cfg)
    assert_equal = zip(
        model.state_dict().values(), again.model.state_dict().values()
    )
    assert all(torch.equal(a, b) for a, b in assert_equal)


def test_the_plain_start_is_the_plain_network(tmp_path):
    plain = randomize(build_model(stock_config(config())))
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / 'plain.pth')
    cfg = config()
    cfg.model.init_cfg = dict(
        type='PlainPretrained', checkpoint=str(tmp_path / 'plain.pth')
    )
    model = build_model(cfg)
    model.init_weights()
    x = image(2, 3, 32, 40, dtype=torch.float32)
    model, plain = model.double().eval(), plain.double().eval()
    found, expected = model(x.double()), plain(x.double())
    assert distance(found[0], expected[0]) < 1e-5


def test_what_the_hook_says():
    cfg = config()
    model = build_model(cfg)
    (part,) = parts_of(cfg, model)
    assert part.asked.place == '' and part.asked.key == 'blocks'
    assert part.asked.sizes == (1, float('inf'))
    assert len(part.blocks) == len(find_blocks(model))
    refuse_no_block(cfg, model)
    assert BlocksHook()  # which reads these
    plain = build_model(stock_config(cfg))
    with pytest.raises(UserError, match='no block: blocks is set in model'):
        refuse_no_block(cfg, plain)


def test_some_merged_and_some_dropped(tmp_path):
    """--only, then the rest; branches dropped in between."""
    path = str(tmp_path / 'config.py')
    cfg = config(rules=[dict(type='DBB', only='backbone.layer*')])
    cfg.dump(path)
    checkpoint = write_checkpoint(path, tmp_path / 'a.pth')
    trained = load_deployed(path, checkpoint)
    x = image(2, 3, 32, 40, dtype=torch.float32)
    expected = trained(x)[0]
    dropped = drop_branches_checkpoint(
        Source(Config.fromfile(path), checkpoint),
        str(tmp_path / 'b.pth'),
        0.2,
        Proof(image_size=(32, 40)),
    )
    written = Config.fromfile(dropped.config)
    assert written.model.type == 'WithBlocks'
    assert written.model.network == 'ImageClassifier'
    assert written.model.dropped == dropped.dropped
    assert dropped.parameters[1] < dropped.parameters[0]
    assert dropped.difference.largest < EXACT
    some = deploy(
        written,
        dropped.checkpoint,
        tmp_path / 'c.pth',
        only=['backbone.layer1.*'],
        image_size=(32, 40),
    )
    fewer = drop_branches_checkpoint(
        Source(Config.fromfile(some.config), some.checkpoint),
        str(tmp_path / 'e.pth'),
        0.5,
        Proof(image_size=(32, 40)),
    )
    assert all('backbone.layer2' in name for name in fewer.dropped)
    rest = deploy(
        Config.fromfile(fewer.config),
        fewer.checkpoint,
        tmp_path / 'd.pth',
        image_size=(32, 40),
    )
    assert not rest.left and Config.fromfile(rest.config).model.type.endswith(
        'ImageClassifier'
    )
    for files in (dropped, some, fewer, rest):
        model = load_deployed(files.config, files.checkpoint)
        assert distance(model(x)[0], expected) < 1e-4


def test_the_tool_shows_and_drops(tmp_path, capsys):
    path, out = str(tmp_path / 'config.py'), tmp_path / 'out.pth'
    config().dump(path)
    checkpoint = write_checkpoint(path, tmp_path / 'a.pth')
    assert run_tool('branches', path, checkpoint) == 0
    text = capsys.readouterr().out
    assert 'backbone.layer1.0.conv1  kx1 ' in text
    assert 'backbone.layer2.0.conv1  separable ' in text
    size = ('--image-size', 32, 40)
    options = ('--drop', 0.5, '--out', out)
    assert run_tool('branches', path, checkpoint, *options, *size) == 0
    assert f'weights: {out}' in capsys.readouterr().out
    build_model(Config.fromfile(tmp_path / 'out.py'))
    for wrong, message in (
        (('--drop', 0.5), '--drop SHARE and --out FILE go together'),
        (('--drop', 0.0, '--out', tmp_path / 'x.pth'), 'no branch that'),
        (options, 'output exists'),
    ):
        assert run_tool('branches', path, checkpoint, *wrong) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / 'x.pth').exists()
