"""What is said at the start of a training, and that nothing else happens."""

import copy
import logging
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import randomize
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from networks import BN, DBB, DETECTOR, SEGMENTOR, SHALLOW, SIZE
from runs import run_config
from torch import nn

import mmdbb
import mmdbb.backbones
from mmdbb.deploy import Proof, Source, deploy_checkpoint
from mmdbb.errors import UserError
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.engine.blocks_hook import BlocksHook
from mmdbb.mm.stock.config import stock_config

pytestmark = pytest.mark.usefixtures('quiet')
HOOK = dict(type='BlocksHook')


def segmentor(**heads):
    """A segmentor whose backbone is plain."""
    backbone = dict(type='ResNet', **SHALLOW)
    common = dict(in_channels=16, channels=8, num_classes=3, norm_cfg=BN)
    heads = {
        name: [dict(common, **h) for h in head]
        if isinstance(head, list)
        else dict(common, **head)
        for name, head in heads.items()
    }
    model = dict(type='EncoderDecoder', backbone=backbone, **heads)
    return Config(dict(default_scope='mmseg', model=model))


def detector(**head):
    """FCOS, whose head has group norms unless told otherwise."""
    bbox_head = dict(
        type='FCOSHead',
        num_classes=2,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        strides=[4, 8],
        regress_ranges=((-1, 64), (64, 1e8)),
        norm_cfg=dict(type='GN', num_groups=2),
    )
    model = dict(
        type='FCOS',
        data_preprocessor=dict(
            type='DetDataPreprocessor', mean=[120.0] * 3, std=[60.0] * 3
        ),
        backbone=dict(type='ResNet', conv_cfg=DBB, **SHALLOW),
        neck=dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2),
        bbox_head=dict(bbox_head, **head),
    )
    return Config(dict(default_scope='mmdet', model=model))


def said(cfg, model=None):
    """What the hook says of a network in training mode, with the level."""
    lines = []
    logger = SimpleNamespace(
        info=lambda text: lines.append(('INFO', text)),
        warning=lambda text: lines.append(('WARNING', text)),
    )
    model = build_model(cfg).train() if model is None else model
    runner = SimpleNamespace(model=model, cfg=cfg, logger=logger)
    BlocksHook().before_train(runner)
    return lines


def test_blocks_of_each_part_are_counted():
    ((level, text),) = said(Config.fromstring(SEGMENTOR, '.py'))
    assert level == 'INFO'
    assert text == (
        '14 blocks of mmdbb: backbone 11, decode_head 1, auxiliary_head 2'
    )


PLAIN_CASES = dict(
    # Takes conv_cfg by its base, and builds all layers without it.
    head=(
        segmentor(decode_head=dict(type='DDRHead', conv_cfg=DBB)),
        'conv_cfg is set in decode_head, but DDRHead builds no layer of it',
    ),
    pointwise=(
        segmentor(
            decode_head=dict(type='FCNHead', conv_cfg=DBB, kernel_size=1)
            | dict(concat_input=False)
        ),
        'decode_head, but FCNHead has no convolution of 2 to 6 taps',
    ),
    rule=(
        segmentor(
            decode_head=dict(
                type='FCNHead', conv_cfg=dict(DBB, min_kernel_size=5)
            )
        ),
        'but FCNHead has no convolution of 5 to 6 taps',
    ),
)


@pytest.mark.parametrize('name', PLAIN_CASES)
def test_no_block_at_all_is_refused(name):
    cfg, reason = PLAIN_CASES[name]
    with pytest.raises(UserError, match='network has no block: .*' + reason):
        said(cfg)


def test_a_part_that_ignores_conv_cfg_is_named():
    text = DETECTOR.replace('Shared4Conv1FCBBoxHead', 'Shared2FCBBoxHead')
    (_, counts), (level, text) = said(Config.fromstring(text, '.py'))
    assert 'backbone 8' in counts and 'neck 2' in counts
    assert level == 'WARNING' and 'train as plain ones' in text
    assert 'roi_head.bbox_head, but Shared2FCBBoxHead has no conv' in text


def test_each_head_of_a_list_is_looked_at():
    heads = [
        dict(type='FCNHead', num_convs=1, concat_input=False, conv_cfg=DBB),
        dict(type='DDRHead', conv_cfg=DBB),
    ]
    cfg = segmentor(decode_head=dict(type='FCNHead'), auxiliary_head=heads)
    (_, counts), (_, ignored) = said(cfg)
    assert counts == '1 block of mmdbb: auxiliary_head.0 1'
    assert 'auxiliary_head.1, but DDRHead builds no layer' in ignored
    assert 'auxiliary_head.0' not in ignored


def test_a_wrapper_builds_its_part_under_other_names():
    """The config says detector, the network has a student and a teacher."""
    inner = detector(conv_bias=True).model
    inner.bbox_head.conv_cfg = DBB
    outer = dict(
        type='SemiBaseDetector',
        detector=inner,
        semi_train_cfg=dict(freeze_teacher=True),
        semi_test_cfg=dict(predict_on='teacher'),
    )
    cfg = Config(dict(default_scope='mmdet', model=outer))
    ((_, text),) = said(cfg)
    assert 'detector.backbone 16' in text
    assert 'detector.bbox_head 4' in text


def test_a_plain_baseline_is_not_mentioned():
    cfg = detector()
    cfg.model.backbone.pop('conv_cfg')
    assert said(cfg) == []
    plain = dict(type='mmpretrain.ResNetDBB', block=dict(type='Conv2d'))
    assert said(Config(dict(model=dict(plain, **SHALLOW)))) == []


def test_a_runner_without_a_config():
    model = nn.ModuleDict(
        dict(stem=nn.Conv2d(3, 4, 3), body=mmdbb.DBB(4, 4, 3))
    )
    (_, text), *_ = said(Config(), model)
    assert text == '1 block of mmdbb: body 1'
    assert said(Config(), nn.Sequential(nn.Conv2d(3, 4, 3))) == []


def test_wrappers_for_several_gpus_are_looked_through():
    cfg = segmentor(decode_head=dict(type='FCNHead', conv_cfg=DBB))

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Wrapper(build_model(cfg))
    ((_, text),) = said(cfg, model)
    assert text == '3 blocks of mmdbb: decode_head 3'


#: The ways out, as the text names them.
WAYS = {
    'model.bbox_head.conv_bias=True': dict(conv_bias=True, conv_cfg=DBB),
    'model.bbox_head.conv_cfg.shift=False': dict(
        conv_cfg=dict(DBB, shift=False)
    ),
    'model.bbox_head.conv_cfg.type=OREPA': dict(conv_cfg=dict(type='OREPA')),
}


def test_blocks_before_a_group_norm_are_named_with_the_ways_out():
    (_, counts), (level, text) = said(detector(conv_cfg=DBB))
    assert 'bbox_head 2' in counts and level == 'WARNING'
    assert 'bbox_head: 2 before GroupNorm (bbox_head.cls_convs.0.conv' in text
    assert all(way in text for way in WAYS)
    assert '--format fused' in text and 'backbone' not in text
    assert max(map(len, text.splitlines())) < 140


@pytest.mark.parametrize('way', WAYS)
def test_each_way_out_leads_out(way, tmp_path):
    cfg = detector(**WAYS[way])
    assert [level for level, _ in said(cfg)] == ['INFO']
    path, model = tmp_path / 'trained.pth', randomize(build_model(cfg))
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    result = deploy_checkpoint(
        Source(cfg, str(path)),
        str(tmp_path / 'out.pth'),
        proof=Proof(image_size=SIZE),
    )
    assert result.structure == 'stock' and result.blocks == 10


def test_layers_that_another_changed_are_named():
    """mmpretrain's SparK gives each norm a forward of its own."""
    cfg = detector(conv_cfg=DBB, norm_cfg=BN)
    model = build_model(cfg)
    assert [level for level, _ in said(cfg, model)] == ['INFO']
    norm = model.bbox_head.cls_convs[0].conv.branches['kxk'].norm
    norm.forward = lambda x: x
    (_, _), (level, text) = said(cfg, model)
    assert level == 'WARNING'
    assert text.startswith(
        '1 block trains, but cannot be merged in this network: '
        'bbox_head.cls_convs.0.conv: branches.kxk.norm has a hook'
    )


def test_a_part_without_the_argument_is_not_promised_it():
    cfg = detector()
    cfg.model.neck.update(norm_cfg=dict(type='GN', num_groups=2), conv_cfg=DBB)
    text = said(cfg)[-1][1]
    assert 'neck: 2 before GroupNorm (neck.fpn_convs.0.conv' in text
    assert 'model.neck.conv_cfg.shift=False' in text
    assert 'conv_bias' not in text


@MODELS.register_module(name='CannotRunOfTests', force=True)
class CannotRun(nn.Module):
    """Takes what no image can be."""

    def __init__(self, conv_cfg):
        super().__init__()
        layer = MODELS.get(conv_cfg['type'])
        self.kept = nn.Sequential(
            layer(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        )
        self.lost = nn.Sequential(
            layer(3, 4, 3, bias=False), nn.GroupNorm(2, 4)
        )

    def forward(self, inputs):
        np.random.rand()
        random.random()
        raise RuntimeError('takes point clouds')


def test_a_network_that_cannot_be_run_is_looked_at_by_names():
    model = dict(type='CannotRunOfTests', conv_cfg=DBB)
    states = np.random.get_state()[1], random.getstate()
    *_, (level, text) = said(Config(dict(model=model)))
    assert (np.random.get_state()[1] == states[0]).all()
    assert random.getstate() == states[1]
    assert level == 'WARNING' and 'by names where not by the data' in text
    assert 'lost: 1 before GroupNorm (lost.0)' in text
    assert 'kept: ' not in text


class Lazy:
    """What a config in the new style holds: classes, not their names."""

    model = dict(type=CannotRun, conv_cfg=dict(type=mmdbb.DBB))


def test_a_config_of_classes():
    cfg = Config(dict(model=dict(Lazy.model)))
    model = CannotRun(DBB)
    assert said(cfg, model)[0][1] == '2 blocks of mmdbb: kept 1, lost 1'
    with pytest.raises(UserError, match='CannotRun has no convolution of 2'):
        said(cfg, nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_the_network_is_left_as_it_was():
    cfg = detector(conv_cfg=DBB)
    model = randomize(build_model(cfg)).train()
    model.backbone.bn1.eval()
    sum(p.sum() for p in model.parameters()).backward()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    grads = [p.grad.clone() for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    said(cfg, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [m.training for m in model.modules()] == modes
    assert all(map(torch.equal, (p.grad for p in model.parameters()), grads))
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any('forward_train' in vars(m) for m in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def conv_config(folder, **changes):
    cfg = run_config(folder, **changes)
    cfg.model.backbone.update(type='ResNet', conv_cfg=DBB)
    cfg.log_level = 'INFO'
    return cfg


def logs(folder):
    return '\n'.join(path.read_text() for path in folder.rglob('*.log'))


LOOPS = dict(
    epochs=dict(by_epoch=True, max_epochs=1),
    iterations=dict(by_epoch=False, max_iters=3, val_interval=3),
)


@pytest.mark.parametrize('loop', LOOPS)
def test_training_goes_on_as_without_the_hook(loop, tmp_path):
    logging.disable(logging.NOTSET)
    found = []
    for hooks in ([], [HOOK]):
        folder = tmp_path / f'{loop}{len(hooks)}'
        cfg = conv_config(folder, custom_hooks=hooks)
        cfg.train_cfg = LOOPS[loop]
        runner = Runner.from_cfg(cfg)
        runner.train()
        found.append(runner.model.state_dict())
        assert logs(folder).count('8 blocks of mmdbb: backbone') == len(hooks)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_validation_and_tests_are_silent(tmp_path):
    logging.disable(logging.NOTSET)
    cfg = conv_config(tmp_path / 'silent', custom_hooks=[HOOK])
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook')
    cfg.update(
        test_dataloader=cfg.val_dataloader,
        test_evaluator=cfg.val_evaluator,
        test_cfg=dict(),
    )
    runner = Runner.from_cfg(cfg)
    runner.val()
    runner.test()
    assert 'blocks of mmdbb' not in logs(tmp_path)


def test_the_runner_refuses_before_the_first_step(tmp_path):
    cfg = conv_config(tmp_path / 'none', custom_hooks=[HOOK])
    cfg.model.backbone.conv_cfg = dict(DBB, min_kernel_size=5)
    with pytest.raises(UserError, match='ResNet has no convolution of 5 to'):
        Runner.from_cfg(cfg).train()


def test_the_hook_is_built_from_its_name():
    assert isinstance(HOOKS.build(HOOK), BlocksHook)
    cfg = conv_config(Path('a/b'), custom_hooks=[HOOK])
    assert 'BlocksHook' not in stock_config(cfg).pretty_text
