"""`TorchDefault` and `BackbonePretrained`: starts of the recipes."""

import re

import pytest
import torch
from helpers import randomize
from mmcv.cnn import ConvModule
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel, BaseModule
from mmpretrain.models import ResNet
from mmpretrain.registry import MODELS
from torch import nn

from mmdbb.errors import UserError
from mmdbb.mm.backbones import ResNetDBB, ResNetV1cDBB
from mmdbb.mm.engine.launch import check_starts
from mmdbb.mm.stock.config import stock_config

pytestmark = pytest.mark.usefixtures('quiet')

SMALL = dict(depth=18, base_channels=8, stem_channels=8)
TORCH = dict(type='TorchDefault')


class Part(BaseModule):
    """A convolution of the host's, and one in a container without init."""

    def __init__(self, init_cfg=TORCH):
        super().__init__(init_cfg)
        self.module = ConvModule(4, 8, 3, norm_cfg=dict(type='BN'))
        self.inside = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 2))


class Whole(BaseModel):
    def __init__(self):
        super().__init__()
        self.first, self.second = Part(), Part()

    def forward(self, x):
        return x


def started(model, seed=0):
    torch.manual_seed(seed)
    model.init_weights()
    return model


def is_torchs(layer):
    bound = layer.weight[0].numel() ** -0.5
    return 0.8 * bound < layer.weight.abs().max() <= bound


def test_layers_of_hosts_start_as_torchs():
    host = started(Part(None))
    assert not is_torchs(host.module.conv)  # Kaiming's, by mmcv
    part = Part()
    nn.init.constant_(part.inside[0].weight, 9)
    with torch.no_grad():
        part.module.bn.running_mean.fill_(3)
    started(part)
    for layer in (part.module.conv, *part.inside):
        assert is_torchs(layer)
    assert (part.module.bn.weight == 1).all()
    assert (part.module.bn.running_mean == 0).all()


def test_the_seed_and_the_name_decide():
    first, again, other = (started(Part(), seed) for seed in (1, 1, 2))
    for name, value in first.named_parameters():
        assert torch.equal(value, again.get_parameter(name))
    assert not torch.equal(first.inside[0].weight, other.inside[0].weight)
    # Equal layers in two parts of a model do not start equal.
    model = started(Whole(), 1)
    assert torch.equal(model.first.inside[0].weight, first.inside[0].weight)
    assert not torch.equal(
        model.first.inside[0].weight, model.second.inside[0].weight
    )


def test_what_is_drawn_after_it_is_not_changed():
    # mmcv's own rules draw from the stream, with and without ours.
    after = []
    for rule in (None, TORCH):
        started(Part(rule), 4)
        assert torch.initial_seed() == 4
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_blocks_keep_their_start():
    model = ResNetDBB(**SMALL, init_cfg=TORCH, block=dict(type='ACB'))
    inside = {n: p.clone() for n, p in model.named_parameters()}
    started(model)
    for name, value in model.named_parameters():
        same = torch.equal(value, inside[name])
        assert same == ('branches' in name or value.dim() == 1), name


def test_zero_init_residual_still_holds():
    for model in (
        ResNet(**SMALL, init_cfg=TORCH, zero_init_residual=True),
        ResNetDBB(**SMALL, init_cfg=TORCH, zero_init_residual=True),
    ):
        started(model)
        block = model.layer2[0]
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert any((norm.weight == 0).all() for norm in norms)
        assert is_torchs(model.conv1)


def test_another_rule_behind_it_is_refused():
    rules = [TORCH, dict(type='Kaiming', layer='Conv2d')]
    with pytest.raises(UserError, match="'TorchDefault' must be the last"):
        started(Part(rules))


def test_stock_config_does_without_it():
    backbone = dict(type='mmpretrain.ResNetDBB', depth=18, init_cfg=TORCH)
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(type='ImageClassifier', backbone=backbone),
        )
    )
    assert stock_config(cfg).model.backbone == dict(
        type='mmpretrain.ResNet', depth=18, init_cfg=None
    )


# BackbonePretrained


@pytest.fixture
def run(tmp_path):
    """The checkpoint of a classifier with blocks, and its backbone."""
    backbone = randomize(ResNetDBB(**SMALL))
    state = {f'backbone.{n}': v for n, v in backbone.state_dict().items()}
    state['head.fc.weight'] = torch.ones(2, 64)
    path = tmp_path / 'run.pth'
    torch.save(dict(state_dict=state), path)
    return str(path), backbone


def from_run(cls, path, **fields):
    rule = dict(type='BackbonePretrained', checkpoint=path)
    return cls(**SMALL, init_cfg=rule, **fields)


def test_a_run_is_loaded_whole(run):
    path, backbone = run
    model = from_run(ResNetDBB, path, zero_init_residual=True)
    model.init_weights()
    expected = backbone.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    'cls, fields, message',
    [
        (ResNetV1cDBB, {}, r'missing: stem\.0.*unexpected: conv1\.weight'),
        (ResNetDBB, dict(block=dict(type='ACB')), r'branches\.kx1'),
        (ResNet, {}, r'unexpected: .*branches'),
    ],
)
def test_a_part_of_a_run_is_an_error(cls, fields, message, run):
    model = from_run(cls, run[0], **fields)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(UserError, match=f'run.pth does not fit.*{message}'):
        model.init_weights()
    names = [n for n, v in model.named_parameters() if n.startswith('conv1')]
    for name in names:  # as before, or as the host's rules
        assert not torch.equal(
            model.get_parameter(name), run[1].get_parameter(name)
        )
    assert before.keys() == model.state_dict().keys()


def test_other_files_are_told_their_rules(tmp_path):
    path = str(tmp_path / 'plain.pth')
    torch.save({'conv1.weight': torch.ones(2)}, path)
    for checkpoint, found in (
        (path, r'has nothing under backbone\.'),
        (str(tmp_path / 'none.pth'), 'checkpoint not found'),
    ):
        model = from_run(ResNetDBB, checkpoint)
        with pytest.raises(UserError, match=found) as error:
            model.init_weights()
        assert 'OfficialPretrained' in str(error.value)
        assert 'PlainPretrained' in str(error.value)


# Before a training


def test_starts_are_checked_wherever_they_stand(tmp_path):
    there = tmp_path / 'there.pth'
    there.write_bytes(b'')

    def model(path, listed=False):
        rule = dict(type='Pretrained', checkpoint=path)
        rules = [dict(type='Kaiming'), rule] if listed else rule
        return ConfigDict(
            teacher=dict(init_cfg=rules), checkpoint='no.pth', heads=[]
        )

    for path in (str(there), 'torchvision://resnet50', 'https://x/y.pth'):
        check_starts(model(path), 'model')
    for listed, place in (
        (False, 'model.teacher.init_cfg'),
        (True, 'model.teacher.init_cfg.1'),
    ):
        message = (
            f'{place} starts from none.pth, which does not exist (no file); '
            f'name yours by --cfg-options {place}.checkpoint=PATH'
        )
        with pytest.raises(UserError, match=re.escape(message)):
            check_starts(model('none.pth', listed), 'model')


def test_the_rules_are_registered_for_every_host():
    model = MODELS.build(dict(type='ResNetDBB', **SMALL, init_cfg=dict(TORCH)))
    assert is_torchs(started(model).conv1)
