"""Blocks of other dimensions, and transposed, in hosts and their configs."""

import copy

import mmseg.models  # noqa: F401  (registers its networks)
import pytest
import torch
from helpers import blocks_of, deploy, distance, export, image, randomize
from mmcv.cnn import ConvModule, build_conv_layer, build_upsample_layer
from mmcv.cnn.bricks import wrappers
from mmengine.config import Config
from mmengine.registry import MODELS
from networks import write_checkpoint
from torch import nn

from mmdbb import DBB, insert_blocks_, load_deployed, merge_back_
from mmdbb.mm.data_flow import FRAMES, image_shape
from mmdbb.mm.quantization.insert_bn import conv_bn_config
from mmdbb.mm.stock.config import stock_config
from mmdbb.mm.upsample import BlockDeconvModule
from mmdbb.reparam import find_blocks

pytestmark = pytest.mark.usefixtures('quiet')
EXACT = 1e-12


def kinds(model):
    return [type(block).__name__ for block in find_blocks(model).values()]


def stock_of(model):
    """The model of a config, as the stock config has it."""
    return stock_config(Config(dict(model=model))).model.to_dict()


@MODELS.register_module(name='TestVideoNet', force=True)
class VideoNet(nn.Module):
    """As mmaction2's ResNet3d: one number, or three, for a kernel."""

    def __init__(self, conv_cfg=dict(type='Conv3d')):  # noqa: B006
        super().__init__()
        norm = dict(type='BN3d')
        self.stem = ConvModule(
            3,
            4,
            (1, 7, 7),
            padding=(0, 3, 3),
            stride=(1, 2, 2),
            conv_cfg=conv_cfg,
            norm_cfg=norm,
        )
        self.a = ConvModule(
            4, 4, 3, padding=1, conv_cfg=conv_cfg, norm_cfg=norm
        )
        self.b = ConvModule(
            4,
            6,
            (1, 3, 3),
            padding=(0, 1, 1),
            conv_cfg=conv_cfg,
            norm_cfg=norm,
        )
        self.c = ConvModule(
            6,
            6,
            (3, 1, 1),
            padding=(1, 0, 0),
            conv_cfg=conv_cfg,
            norm_cfg=norm,
        )

    def forward(self, x):
        return self.c(self.b(self.a(self.stem(x))))


@MODELS.register_module(name='TestSoundNet', force=True)
class SoundNet(nn.Module):
    def __init__(self, conv_cfg=dict(type='Conv1d')):  # noqa: B006
        super().__init__()
        norm = dict(type='BN1d')
        self.a = ConvModule(
            2, 4, 5, padding=2, conv_cfg=conv_cfg, norm_cfg=norm
        )
        self.b = ConvModule(4, 4, 1, conv_cfg=conv_cfg, norm_cfg=norm)

    def forward(self, x):
        return self.b(self.a(x))


@MODELS.register_module(name='TestUpNet', force=True)
class UpNet(nn.Module):
    def __init__(self, upsample_cfg=dict(type='deconv')):  # noqa: B006
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.ups = nn.Sequential(
            build_upsample_layer(
                upsample_cfg,
                in_channels=4,
                out_channels=6,
                kernel_size=4,
                stride=2,
                padding=1,
            ),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            build_upsample_layer(
                upsample_cfg,
                in_channels=6,
                out_channels=4,
                kernel_size=1,
                stride=1,
            ),
        )

    def forward(self, x):
        return self.ups(self.first(x))


@pytest.mark.parametrize(
    'args, options, kind',
    [
        ((4, 6, (1, 3, 3)), dict(type='DBB'), 'DBB3d'),
        ((4, 6, (1, 3, 3)), dict(type='ACB'), 'ACB3d'),
        ((4, 6, (3,)), dict(type='DBB'), 'DBB1d'),
        ((4, 6, 3), dict(type='DBB3d'), 'DBB3d'),
        ((4, 6, 3), dict(type='OREPARepVGG1d'), 'OREPARepVGG1d'),
        ((4, 6, 3), dict(type='DBBTranspose2d'), 'DBBTranspose2d'),
        ((4, 6, (1, 1, 1)), dict(type='DBB'), 'Conv3d'),
        ((4, 6, (5, 7, 7)), dict(type='DBB'), 'Conv3d'),
        ((4, 6, (1, 1, 1)), dict(type='OREPA'), 'OREPAConv3d'),
        ((4, 6, 1), dict(type='DBB1d'), 'Conv1d'),
        ((4, 6, (3, 3)), dict(type='DBB'), 'DBB'),
    ],
    ids=str,
)
def test_the_kernel_says_which_form(args, options, kind):
    layer = build_conv_layer(options, *args, stride=1)
    assert type(layer).__name__ == kind
    by_keywords = build_conv_layer(
        options, in_channels=4, out_channels=6, kernel_size=args[2]
    )
    assert type(by_keywords).__name__ == kind


@pytest.mark.parametrize('layer', ['DBB', DBB, 'OREPA', 'RepVGGConv'])
def test_the_default_of_a_class_says_which_form(layer):
    model = VideoNet(dict(type=layer))
    name = dict(DBB='DBB3d', OREPA='OREPAConv3d').get(layer, 'RepVGGConv3d')
    name = 'DBB3d' if layer is DBB else name
    count = 4 if layer == 'OREPA' else 3
    assert kinds(model) == [name] * count
    assert isinstance(model.a.bn, nn.BatchNorm3d)
    sound = SoundNet(dict(type=layer))
    assert kinds(sound)[0] == name.replace('3d', '1d')
    # mmseg's PointHead has kernels of 1 only.
    head = dict(type='mmseg.PointHead', in_channels=[8], in_index=[0])
    head.update(channels=8, num_classes=3, conv_cfg=dict(type=layer))
    found = kinds(MODELS.build(head))
    assert set(found) == ({'OREPAConv1d'} if layer == 'OREPA' else set())


def test_a_block_without_a_form_is_refused():
    with pytest.raises(ValueError, match='ACB has no form for an nn.Conv1d'):
        SoundNet(dict(type='ACB'))


def test_the_stock_config_names_the_layer():
    video, sound = dict(type='TestVideoNet'), dict(type='TestSoundNet')
    up = dict(type='TestUpNet')

    def layer(cfg, key='conv_cfg', **block):
        return stock_of(dict(cfg, **{key: block}))[key]

    conv3d = dict(type='Conv3d')
    assert layer(video, type='DBB') == conv3d
    assert layer(video, type='DBB3d', single_init=True) == conv3d
    assert layer(video, type='DBB', bias=False) == dict(conv3d, bias=False)
    assert layer(sound, type='DBB') == dict(type='Conv1d')
    resnet = dict(type='mmseg.ResNet', depth=18)
    assert layer(resnet, type='DBB') is None
    assert layer(resnet, type='DBB3d') == conv3d
    # A pathway of SlowFast, of a type that no registry knows.
    own = dict(type='resnet3d', conv_cfg=dict(type='DBB'), depth=18)
    found = stock_of(dict(type='Any', slow_pathway=own))['slow_pathway']
    assert found == dict(type='resnet3d', depth=18)
    deconv = dict(type='deconv', bias=False)
    for name in ('DBB', 'DBBTranspose2d'):
        assert layer(up, 'upsample_cfg', type=name, bias=False) == deconv
    found = layer(up, 'upsample_cfg', type='DBBTranspose3d', gamma_init=0.5)
    assert found == dict(type='deconv3d')
    cfg = Config(dict(model=dict(video, conv_cfg=dict(type='DBB'))))
    new = conv_bn_config(cfg, VideoNet(dict(type='DBB')))
    assert kinds(MODELS.build(new.model)) == ['ConvBN3d'] * 3
    cfg = Config(
        dict(model=dict(up, upsample_cfg=dict(type='DBB', bias=True)))
    )
    new = conv_bn_config(cfg, UpNet(dict(type='DBB')))
    assert new.model.upsample_cfg.bias
    assert kinds(MODELS.build(new.model)) == ['ConvBNTranspose2d']


@pytest.mark.parametrize('layer', ['DBB', DBB, 'DBBTranspose2d'])
def test_upsample_layers(layer):
    model = UpNet(dict(type=layer))
    assert kinds(model) == ['DBBTranspose2d']
    assert type(model.ups[3]) is nn.ConvTranspose2d  # of one tap
    with pytest.raises(TypeError, match=r"unknown keys \['scale_factor'\]"):
        build_upsample_layer(dict(type=layer, scale_factor=2), 4, 4, 4)


def test_a_u_net_starts_and_ends_as_the_stock_one():
    plain = MODELS.build(
        dict(type='mmseg.DeconvModule', in_channels=4, out_channels=6)
    ).eval()
    randomize(plain)
    cfg = dict(type='BlockDeconvModule', in_channels=4, out_channels=6)
    module = MODELS.build(dict(cfg, block=dict(type='DBB', gamma_init=0.5)))
    assert kinds(module) == ['DBBTranspose2d']
    module.load_state_dict(plain.state_dict())
    x = image(2, 4, 5, 6, dtype=torch.float32)
    with torch.no_grad():
        assert distance(module.eval()(x), plain(x)) < 1e-5
    assert stock_of(dict(cfg, block=dict(type='DBB'))) == dict(
        cfg, type='mmseg.DeconvModule'
    )
    saving = BlockDeconvModule(4, 6, with_cp=True).train()
    other = copy.deepcopy(saving)
    other.with_cp = False
    for each in (saving, other):
        each(x.clone().requires_grad_()).sum().backward()
    for one, two in zip(saving.parameters(), other.parameters()):
        assert torch.allclose(one.grad, two.grad, atol=1e-4)
    for size, factor in ((3, 2), (1, 2)):
        with pytest.raises(ValueError, match='kernel_size must be scale_fac'):
            BlockDeconvModule(4, 6, kernel_size=size, scale_factor=factor)


def test_layers_that_mmcv_wraps_become_blocks():
    """As the deconvolutions of mmpose's heads, and mmaction2's layers."""
    model = nn.Sequential(
        wrappers.ConvTranspose2d(4, 6, 4, 2, 1, bias=False),
        nn.BatchNorm2d(6),
        wrappers.Conv2d(6, 4, 3),
    ).double()
    randomize(model).eval()
    x = image(2, 4, 5, 6)
    y = model(x)
    assert insert_blocks_(model) == ['0', '2']
    assert kinds(model) == ['DBBTranspose2d', 'DBB']
    assert distance(model(x), y) < EXACT
    assert merge_back_(model) == ['0', '2']
    assert distance(model(x), y) < EXACT
    assert type(model[0]) is nn.ConvTranspose2d and model[0].bias is None


def test_networks_are_run_on_images_of_their_dimensions():
    video, sound, up = VideoNet(), SoundNet(), UpNet()
    assert image_shape(video, 3, (32, 24)) == (3, FRAMES, 32, 24)
    assert image_shape(sound, 2, (32, 24)) == (2, 24)
    assert image_shape(up, 3, (32, 24)) == (3, 32, 24)
    assert image_shape(nn.Flatten(), 3, (32, 24)) == (3, 32, 24)


@pytest.mark.parametrize(
    'model, options',
    [
        (dict(type='TestVideoNet', conv_cfg=dict(type='DBB')), {}),
        (dict(type='TestVideoNet', conv_cfg=dict(type='OREPA')), {}),
        (dict(type='TestSoundNet', conv_cfg=dict(type='RepVGGConv')), {}),
        (
            dict(type='TestUpNet', upsample_cfg=dict(type='DBB')),
            dict(fuse=True),
        ),
    ],
    ids=str,
)
def test_deploys(tmp_path, model, options):
    Config(dict(model=model, custom_imports=dict(imports=['mmdbb']))).dump(
        str(tmp_path / 'config.py')
    )
    checkpoint = write_checkpoint(
        tmp_path / 'config.py', tmp_path / 'trained.pth'
    )
    result = deploy(
        Config.fromfile(tmp_path / 'config.py'),
        checkpoint,
        str(tmp_path / 'out.pth'),
        image_size=(24, 20),
        **options,
    )
    assert 0 < result.difference.largest < 1e-4
    loaded = load_deployed(result.config, result.checkpoint)
    assert not blocks_of(loaded) and result.blocks > 0
    text = (tmp_path / 'out.py').read_text()
    assert 'DBB' not in text.replace('mmdbb', '')


@pytest.mark.parametrize(
    'model', [VideoNet, SoundNet, UpNet], ids=lambda m: m.__name__
)
def test_onnx_there_and_back(tmp_path, model):
    key = 'upsample_cfg' if model is UpNet else 'conv_cfg'
    network = randomize(model(**{key: dict(type='DBB')})).eval()
    channels = 2 if model is SoundNet else 3
    found = export(
        network,
        str(tmp_path / 'net.onnx'),
        image_size=(20, 24),
        channels=channels,
    )
    assert found.blocks and found.difference.largest < 1e-4
