"""Blocks that come into a network by another way than the key `conv_cfg`."""

import pytest
import torch
from helpers import distance, image, randomize, run_tool
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn

import mmdbb
from mmdbb import DBB, load_deployed
from mmdbb.deploy import stock_config
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import refuse_untied
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.engine.blocks_hook import BlocksHook
from mmdbb.reparam import find_blocks

pytestmark = pytest.mark.usefixtures('quiet')


class Net(BaseModel):
    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.net(inputs)


@MODELS.register_module()
class OwnKeyOfTests(Net):
    """Its layers stand in keys of its own."""

    def __init__(self, layer, layers, data_preprocessor=None):
        super().__init__(data_preprocessor)
        sizes = dict(padding=1, bias=True)
        first = build_conv_layer(layer, 3, 4, 3, **sizes)
        self.net = nn.Sequential(first, *map(MODELS.build, layers))


@MODELS.register_module()
class DefaultOfTests(Net):
    """A block is its default."""

    def __init__(self, conv_cfg=dict(type='DBB'), data_preprocessor=None):  # noqa: B006
        super().__init__(data_preprocessor)
        self.net = nn.Sequential(
            ConvModule(3, 4, 3, conv_cfg=conv_cfg, norm_cfg=dict(type='BN')),
            nn.ReLU(),
            ConvModule(4, 4, 3, conv_cfg=conv_cfg, norm_cfg=dict(type='BN')),
        )


@MODELS.register_module()
class BuiltInOfTests(Net):
    """It builds a block, whatever its config says."""

    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.net = nn.Sequential(DBB(3, 4, 3), nn.Conv2d(4, 4, 1))


@MODELS.register_module()
class InsertedOfTests(Net):
    """It inserts a block by itself."""

    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        mmdbb.insert_blocks_(self.net)


OWN_KEY = dict(
    type='OwnKeyOfTests',
    layer=dict(type='DBB', norm_cfg=dict(type='BN', eps=1e-3)),
    layers=[
        dict(type='ReLU'),
        dict(type='OREPA', in_channels=4, out_channels=4, kernel_size=3),
    ],
)


def trained(model, folder):
    """A checkpoint of a network, and its config."""
    cfg = Config(dict(model=model))
    network = randomize(build_model(cfg))
    torch.save(dict(state_dict=network.state_dict()), folder / 'in.pth')
    cfg.custom_imports = dict(imports=['mmdbb'], allow_failed_imports=False)
    cfg.dump(folder / 'in.py')
    return network.eval()


@pytest.mark.parametrize('form', ['stock', 'fused'])
@pytest.mark.parametrize('model', [OWN_KEY, dict(type='DefaultOfTests')])
def test_it_deploys(model, form, tmp_path):
    network = trained(model, tmp_path)
    assert len(find_blocks(network)) == 2
    names = [str(tmp_path / n) for n in ('in.py', 'in.pth', 'out.pth')]
    options = ['--image-size', 32, 32, '--format', form]
    assert run_tool('reparam', *names, *options) == 0
    found = load_deployed(names[2].replace('.pth', '.py'), names[2])
    assert not find_blocks(found)
    x = image(2, 3, 13, 11).float()
    assert distance(found(x), network(x)) < 1e-5


def test_the_stock_config_has_the_layers_of_torch():
    plain = stock_config(Config(dict(model=OWN_KEY))).model
    assert plain.layer == dict(type='Conv2d')
    sizes = dict(in_channels=4, out_channels=4, kernel_size=3)
    assert plain.layers == [dict(type='ReLU'), dict(sizes, type='Conv2d')]
    plain = stock_config(Config(dict(model=dict(type='DefaultOfTests')))).model
    assert plain.conv_cfg == dict(type='Conv2d')


@pytest.mark.parametrize('name', ['BuiltInOfTests', 'InsertedOfTests'])
@pytest.mark.parametrize('form', ['stock', 'fused'])
def test_what_no_config_can_leave_out_is_said(name, form, tmp_path, capfd):
    trained(dict(type=name), tmp_path)
    names = [str(tmp_path / n) for n in ('in.py', 'in.pth', 'out.pth')]
    options = ['--image-size', 32, 32, '--format', form]
    assert run_tool('reparam', *names, *options) == 2
    said = capfd.readouterr().err
    assert 'builds the blocks net.0 by itself' in said
    assert 'mmdbb.reparameterize(model)' in said
    assert not (tmp_path / 'out.pth').exists()


@MODELS.register_module()
class NeedsBlocksOfTests(Net):
    """It cannot be built without blocks."""

    def __init__(self, conv_cfg=None, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.net = build_conv_layer(conv_cfg, 3, 4, 3)
        assert isinstance(self.net, DBB), 'I want blocks'


SAID = {
    'BuiltInOfTests': 'builds the blocks net.0 by itself',
    'OwnKeyOfTests': None,
    'NeedsBlocksOfTests': 'cannot be built: AssertionError: I want blocks',
}


@pytest.mark.parametrize('name', SAID)
def test_it_is_said_before_the_training(name):
    model = OWN_KEY if name == 'OwnKeyOfTests' else dict(type=name)
    if name == 'NeedsBlocksOfTests':
        model['conv_cfg'] = dict(type='DBB')
    cfg, lines = Config(dict(model=model)), []

    class Runner:
        logger = type('', (), dict(info=lines.append, warning=lines.append))

    Runner.cfg, Runner.model = cfg, build_model(cfg).train()
    BlocksHook().before_train(Runner)
    said = [line for line in lines if 'tools/reparam.py will' in line]
    assert len(said) == (SAID[name] is not None)
    assert all(SAID[name] in line for line in said)


def test_layers_of_one_tensor_are_not_merged_into_two():
    """Whoever loads the file would get the last kernel in both."""
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, bias=False) for _ in range(2)))
    state = {n: v.clone() for n, v in net.state_dict().items()}
    refuse_untied(net, state, 'out.pth')
    net[1].weight = net[0].weight
    with pytest.raises(UserError, match='0.weight and 1.weight are one ten'):
        refuse_untied(net, state, 'out.pth')
    state['1.weight'] = state['0.weight'].clone()
    refuse_untied(net, state, 'out.pth')


@MODELS.register_module()
class TiedOfTests(Net):
    """Two layers have one kernel."""

    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.net = nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1, bias=False),
            nn.Conv2d(3, 3, 3, padding=2, dilation=2, bias=False),
            nn.Conv2d(3, 4, 3),
        )
        self.net[1].weight = self.net[0].weight


def test_blocks_leave_tied_layers_alone(tmp_path):
    model = dict(
        type='WithBlocks', network='TiedOfTests', blocks=[dict(type='OREPA')]
    )
    network = trained(model, tmp_path)
    assert [*find_blocks(network)] == ['net.2']
    names = [str(tmp_path / n) for n in ('in.py', 'in.pth', 'out.pth')]
    assert run_tool('reparam', *names, '--image-size', 32, 32) == 0
    found = build_model(Config.fromfile(names[2].replace('.pth', '.py')))
    state = torch.load(names[2], weights_only=False)['state_dict']
    found.load_state_dict(state)
    x = image(2, 3, 13, 11).float()
    assert distance(found(x), network(x)) < 1e-5


@MODELS.register_module()
class TiedIfPlainOfTests(Net):
    """Its layers have one kernel, but for blocks, which have none to share."""

    def __init__(self, conv_cfg=None, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.net = nn.Sequential(
            *(
                build_conv_layer(conv_cfg, 3, 3, 3, bias=False)
                for _ in range(2)
            )
        )
        if 'weight' in self.net[0]._parameters:
            self.net[1].weight = self.net[0].weight


def test_files_that_would_load_otherwise_are_not_written(tmp_path, capfd):
    model = dict(type='TiedIfPlainOfTests', conv_cfg=dict(type='OREPA'))
    trained(model, tmp_path)
    names = [str(tmp_path / n) for n in ('in.py', 'in.pth', 'out.pth')]
    assert run_tool('reparam', *names, '--image-size', 32, 32) == 2
    said = capfd.readouterr().err
    assert 'net.0.weight and net.1.weight are one tensor' in said
    assert not (tmp_path / 'out.pth').exists()
