"""Merged networks as ONNX, TorchScript and torch.export files."""

import builtins
import copy
import hashlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import (
    EXACT,
    SINGLE,
    blocks_of,
    distance,
    export,
    image,
    randomize,
)
from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvWS2d
from mmengine.config import Config
from networks import (
    BN,
    CONFIGS,
    SHALLOW,
    SIZE,
    write_checkpoint,
    write_config,
)
from torch import nn
from unusual import byol, detr, pointrend, sparse_rcnn

import mmdbb
from mmdbb import DBB, reparameterize
from mmdbb.blocks.build import registered_blocks
from mmdbb.errors import UserError
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.export.checkpoint import export_checkpoint
from mmdbb.mm.export.folding import fold_norms_
from mmdbb.mm.export.formats import (
    FORMATS,
    ONNX_OPSET,
    SCOPES,
    file_format,
    silence,
)
from mmdbb.mm.export.modules import export_module, preprocessing
from mmdbb.mm.export.network import export_network
from mmdbb.mm.outputs import Proof, Source

pytestmark = [
    pytest.mark.usefixtures('quiet'),
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
]
TOOL = Path(mmdbb.__file__).parent.parent / 'tools' / 'reparam.py'
CONV = dict(type='DBB')
HEAD = dict(num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1)


def single_stage(kind, **head):
    return dict(
        type=kind,
        backbone=dict(type='ResNet', conv_cfg=CONV, **SHALLOW),
        neck=dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2),
        bbox_head=dict(**HEAD, **head),
    )


def retinanet():
    return single_stage('RetinaNet', type='RetinaHead', conv_cfg=CONV)


def fcos():
    # Without norm_on_bbox it exponentiates its boxes, and their roundings.
    return single_stage(
        'FCOS',
        type='FCOSHead',
        strides=[4, 8],
        norm_cfg=BN,
        norm_on_bbox=True,
    )


def cascade():
    head = dict(
        type='FCNHead',
        in_channels=16,
        in_index=1,
        channels=8,
        num_convs=1,
        num_classes=3,
        norm_cfg=BN,
        conv_cfg=CONV,
        align_corners=False,
    )
    second = dict(head, type='OCRHead', ocr_channels=8)
    second.pop('num_convs')
    return dict(
        type='CascadeEncoderDecoder',
        num_stages=2,
        backbone=dict(type='ResNet', conv_cfg=CONV, **SHALLOW),
        decode_head=[head, second],
    )


#: Name -> default scope and model of a config.
MODELS = {
    'fcos': ('mmdet', fcos),
    'retinanet': ('mmdet', retinanet),
    'cascade': ('mmseg', cascade),
}


@pytest.fixture(scope='module')
def model_of():
    """Networks with blocks by name, built once."""
    built = {}

    def build(name):
        if name not in built:
            if name in CONFIGS:
                cfg = Config.fromstring(CONFIGS[name], '.py')
            else:
                scope, model = MODELS[name]
                cfg = Config(dict(default_scope=scope, model=model()))
            built[name] = randomize(build_model(cfg))
        return built[name]

    return build


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(
        path, providers=['CPUExecutionProvider']
    )
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {'images': images.numpy()})
    return dict(zip(names, map(torch.from_numpy, values)))


def run_torchscript(path, images):
    extra = {'mmdbb.json': ''}
    outputs = torch.jit.load(path, _extra_files=extra)(images)
    return dict(zip(json.loads(extra['mmdbb.json'])['outputs'], outputs))


def run_torch_export(path, images):
    extra = {'mmdbb.json': ''}
    outputs = torch.export.load(path, extra_files=extra).module()(images)
    return dict(zip(json.loads(extra['mmdbb.json'])['outputs'], outputs))


RUN = {
    'onnx': run_onnx,
    'torchscript': run_torchscript,
    'torch.export': run_torch_export,
}


def expected_of(model, images, head):
    """The host's own answer, from the network with its blocks."""
    with torch.no_grad():
        if hasattr(model, 'decode_head') or not hasattr(model, 'extract_feat'):
            y = model(images)
            return [y] if isinstance(y, torch.Tensor) else list(y)
        if hasattr(model, 'head'):
            return [model.head(model.extract_feat(images))]
        features = model.extract_feat(images)
        if not head:
            return list(features)
        if hasattr(model, 'bbox_head'):
            maps = model.bbox_head(features)
            return [level for levels in maps for level in levels]
        maps = model.rpn_head(features)
        return [*features, *(level for levels in maps for level in levels)]


FEATURES = ['feature_0', 'feature_1']
RPN = [f'{kind}_{i}' for kind in ('cls_scores', 'bbox_preds') for i in (0, 1)]
#: Network, head, names of the outputs.
CASES = [
    ('classifier', False, ['logits']),
    ('segmentor', False, ['logits']),
    ('detector', False, [*FEATURES, 'feature_2']),
    (
        'detector',
        True,
        [
            *(f'feature_{i}' for i in range(3)),
            *(f'cls_scores_{i}' for i in range(3)),
            *(f'bbox_preds_{i}' for i in range(3)),
        ],
    ),
]
MORE_CASES = [
    ('cascade', False, ['logits']),
    ('retinanet', False, FEATURES),
    ('retinanet', True, RPN),
    ('fcos', True, [*RPN, 'centernesses_0', 'centernesses_1']),
]


@pytest.mark.parametrize(
    ('format', 'name', 'head', 'names'),
    [
        *((f, *case) for f in FORMATS for case in CASES),
        *(('torchscript', *case) for case in MORE_CASES),
        ('onnx', *MORE_CASES[2]),
    ],
)
def test_file_gives_what_the_network_gives(
    format, name, head, names, model_of, tmp_path
):
    model = model_of(name)
    out = str(tmp_path / f'net{FORMATS[format].suffix}')
    result = export(model, out, format, SIZE, head=head)
    assert result.path == out and list(result.outputs) == names
    assert result.blocks == len(blocks_of(model)) > 0
    assert result.difference.largest < SINGLE
    assert list(result.difference.compared) == names
    # Again, and with batches of other sizes than it was traced with.
    for count in (1, 4):
        images = image(count, 3, *SIZE, seed=count, dtype=torch.float32)
        found = RUN[format](out, images)
        expected = expected_of(model, images, head)
        assert list(found) == names and len(expected) == len(names)
        for (key, y), expect in zip(found.items(), expected):
            assert distance(y, expect) < SINGLE, key
            assert tuple(y.shape[1:]) == result.outputs[key]


@pytest.fixture(scope='module')
def onnx_file(model_of, tmp_path_factory):
    path = str(tmp_path_factory.mktemp('onnx') / 'net.onnx')
    return path, export(model_of('segmentor'), path, 'onnx', SIZE)


def test_onnx_model_is_clean(onnx_file):
    path, _ = onnx_file
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    kinds = [node.op_type for node in loaded.graph.node]
    assert 'BatchNormalization' not in kinds and 'Identity' not in kinds
    notes = [p for node in loaded.graph.node for p in node.metadata_props]
    assert {p.key for p in notes} <= {SCOPES}
    assert [o.version for o in loaded.opset_import] == [ONNX_OPSET]
    for value in (*loaded.graph.input, *loaded.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == 'batch'
    # Parts of the network that are for training are left out.
    assert not [i for i in loaded.graph.initializer if 'auxiliary' in i.name]


def test_files_name_no_path_of_this_machine(model_of, tmp_path):
    for format, kind in FORMATS.items():
        out = tmp_path / f'net{kind.suffix}'
        export(model_of('classifier'), str(out), format, SIZE)
        data = out.read_bytes()
        for path in (nn.__file__, export_network.__code__.co_filename):
            assert path.encode() not in data, format


def test_metadata_says_what_to_do_with_images(onnx_file):
    path, result = onnx_file
    props = {p.key: p.value for p in onnx.load(path).metadata_props}
    said = json.loads(props['mmdbb'])
    assert said.pop('opset') == ONNX_OPSET
    assert said == json.loads(json.dumps(result.metadata))
    assert said['merged_blocks'] == result.blocks
    assert said['outputs'] == ['logits']
    assert said['input'] == dict(
        name='images',
        shape=['batch', 3, *SIZE],
        mean=[120.0] * 3,
        std=[60.0] * 3,
        channel_order='BGR',
    )


def test_onnx_from_pixels_by_the_metadata_alone(onnx_file, model_of):
    """What the docs tell a user to do is what the host does."""
    path, result = onnx_file
    say = result.metadata['input']
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    x = pixels[..., ::-1] if say['channel_order'] == 'RGB' else pixels
    x = (x - np.float32(say['mean'])) / np.float32(say['std'])
    x = torch.from_numpy(x.transpose(2, 0, 1)[None].copy())
    model = model_of('segmentor')
    chw = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    host = copy.deepcopy(model.data_preprocessor)
    host.size = SIZE
    with torch.no_grad():
        expected = model(host(dict(inputs=[chw]))['inputs'])
    assert distance(run_onnx(path, x)['logits'], expected) < SINGLE


def test_preprocessing_of_hosts(model_of):
    assert preprocessing(model_of('classifier'))['channel_order'] == 'RGB'
    assert preprocessing(model_of('detector'))['channel_order'] == 'BGR'
    assert preprocessing(nn.Conv2d(3, 4, 1)) == dict(
        mean=None, std=None, channel_order=None
    )


# The network


class Backbone(nn.Module):
    """One or several features, in the three ways that networks give them."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.one = nn.Sequential(
            DBB(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.two = DBB(4, 4, 3, padding=1)
        self.for_training = nn.Linear(1000, 1000)

    def forward(self, x):
        a = self.one(x)
        b = self.two(a)
        return {
            'tensor': b,
            'single': (b,),
            'tuple': (a, b),
            'dict': dict(low=a, high=b),
        }[self.how]


@pytest.mark.parametrize(
    ('how', 'names'),
    [
        ('tensor', ['output']),
        ('single', ['output']),
        ('tuple', ['output_0', 'output_1']),
        ('dict', ['output_low', 'output_high']),
    ],
)
def test_any_network(how, names, tmp_path):
    model = randomize(Backbone(how)).double()
    out = tmp_path / 'net.pt'
    result = export(model, out, 'torchscript', (6, 7))
    assert list(result.outputs) == names
    assert out.stat().st_size < 100_000  # without what is for training
    x = image(2, 3, 6, 7)
    found = run_torchscript(str(out), x.float())
    expected = model.eval()(x)
    if isinstance(expected, dict):
        expected = tuple(expected.values())
    expected = expected if isinstance(expected, tuple) else (expected,)
    for y, expect in zip(found.values(), expected):
        assert distance(y, expect) < SINGLE


def test_network_is_unchanged(tmp_path):
    model = randomize(Backbone('tensor')).train()
    model.one[1].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    export(model, str(tmp_path / 'net.pt'), 'torchscript', (6, 7))
    assert [module.training for module in model.modules()] == modes
    assert len(blocks_of(model)) == 2 and model.for_training is not None
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_merged_network(tmp_path):
    model = reparameterize(randomize(Backbone('tensor')))
    out = str(tmp_path / 'net.pt')
    result = export(model, out, 'torchscript', (6, 7))
    assert result.blocks == 0
    assert result.difference.largest < SINGLE


@pytest.mark.parametrize('fold', [True, False])
def test_norms_are_folded_if_asked(fold, tmp_path):
    path = str(tmp_path / 'net.pt')
    model = randomize(Backbone('tensor'))
    assert export(model, path, 'torchscript', (6, 7), fold_norms=fold).blocks
    graph = str(torch.jit.load(path).inlined_graph)
    assert ('aten::batch_norm' in graph) == (not fold)


class Both(nn.Module):
    """A norm behind a layer, each in a place that says nothing of it."""

    def __init__(self, conv, norm):
        super().__init__()
        self.norm, self.first = norm, conv
        self.other, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.last(self.other(self.norm(self.first(x))).relu())


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    'conv, norm, folded',
    [
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), True),
        (nn.Conv2d(3, 4, 3, bias=False), nn.SyncBatchNorm(4), True),
        (Conv2dAdaptivePadding(3, 4, 3), nn.BatchNorm2d(4, affine=False), 1),
        (ConvWS2d(3, 4, 3), nn.BatchNorm2d(4), False),
        (Twice(3, 4, 3), nn.BatchNorm2d(4), False),
        (nn.Conv2d(3, 4, 3), NormAndReLU(4), False),
        (nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), False),
        (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4, track_running_stats=False),
            False,
        ),
    ],
    ids=str,
)
def test_norms_are_folded_where_that_is_right(conv, norm, folded):
    model = randomize(Both(conv, norm)).double().eval()
    x = image(2, 3, 8, 9)
    expected = copy.deepcopy(model)(x)
    found = fold_norms_(model, x)
    assert found == (dict(first='norm') if folded else {})
    assert isinstance(model.norm, nn.Identity) == bool(folded)
    assert distance(model(x), expected) < EXACT
    weight = model.first.weight
    assert weight.dtype is torch.float64 and weight.requires_grad


def test_a_norm_that_two_convolutions_share_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.b = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.norm(self.a(x)) + self.norm(self.b(x))

    assert fold_norms_(Shared().eval(), image(2, 3, 4, 5).float()) == {}


def test_says_that_it_merged(tmp_path, monkeypatch):
    import mmdbb.mm.export.network as network

    said = []
    monkeypatch.setattr(
        network, 'print_log', lambda text, _: said.append(text)
    )
    model = randomize(Backbone('tensor'))
    export(model, str(tmp_path / 'net.pt'), 'torchscript', (6, 7))
    assert said == ['merged 2 blocks of a copy of the network for the export']


def test_given_images_are_compared_too(tmp_path):
    model = randomize(Backbone('tensor'))
    out = str(tmp_path / 'net.pt')
    bad = torch.full((1, 3, 6, 7), float('nan'))
    with pytest.raises(UserError, match='differs by inf'):
        export(model, out, 'torchscript', (6, 7), images=[bad])
    good = image(2, 3, 6, 7)
    export(model, out, 'torchscript', (6, 7), images=[good])


# Torch's exporters called on a network that is not merged


class Side(nn.Module):
    """Every registered block, side by side: one output each."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict(
            {
                name: kind(3, 4, 3, padding=1)
                for name, kind in registered_blocks().items()
            }
        )

    def forward(self, x):
        return {n: block(x).relu() for n, block in self.blocks.items()}


@pytest.mark.parametrize('format', FORMATS)
def test_every_format_there_and_back(format, tmp_path):
    """Blocks that are not merged: slower, but never another function.

    As a format writes and loads by itself, and in batches of other sizes.
    """
    kind = FORMATS[format]
    assert kind.suffix.startswith('.') and format in RUN, (
        'give RUN what a user would read the file with'
    )
    model = randomize(Side()).eval()
    module = export_module(model)
    out = str(tmp_path / f'net{kind.suffix}')
    names = [f'output_{name}' for name in model.blocks]
    assert file_format(format, out) is kind
    with pytest.raises(UserError, match=f'must end in {kind.suffix}, got'):
        file_format(format, str(tmp_path / 'net.other'))
    with torch.no_grad(), silence():
        example = torch.zeros(2, 3, 6, 7)
        kind.write(module, example, names, dict(outputs=names), out)
        loaded = kind.load(out)
        for count in (1, 3):
            x = image(count, 3, 6, 7, dtype=torch.float32)
            expected = [b.to_conv()(x).relu() for b in model.blocks.values()]
            # The recording leaves nothing behind in the block.
            for y, z in zip(model(x).values(), expected):
                assert distance(y, z) < SINGLE
            found = RUN[format](out, x)
            assert list(found) == names
            again = loaded(x)
            assert len(again) == len(found) == len(expected)
            for name, y, z in zip(names, again, expected):
                assert distance(found[name], z) < SINGLE, name
                assert distance(y, z) < SINGLE, name


# Nothing wrong is written


def refused(match, *args, **kwargs):
    with pytest.raises(UserError, match=match):
        export(*args, **kwargs)


@pytest.fixture
def net():
    return randomize(Backbone('tensor'))


@pytest.mark.parametrize('format', FORMATS)
def test_wrong_suffix(net, format, tmp_path):
    suffix = FORMATS[format].suffix.replace('.', '[.]')
    match = f'{format} must end in {suffix}, got .*net.pth'
    refused(match, net, str(tmp_path / 'net.pth'), format)
    assert not list(tmp_path.iterdir())


def test_unknown_format(net, tmp_path):
    match = "one of onnx, torchscript, torch.export; got 'tflite'"
    refused(match, net, str(tmp_path / 'net.tflite'), 'tflite')


@pytest.mark.parametrize('missing', FORMATS['onnx'].packages)
def test_missing_package(net, missing, tmp_path, monkeypatch):
    """The packages are optional: a missing one says how to get it."""
    import importlib

    real = importlib.import_module

    def without(name, *args):
        if name == missing:
            raise ModuleNotFoundError(f'No module named {name}', name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, 'import_module', without)
    match = rf'needs {missing} \(.*\); .*: .* install -e "\.\[formats\]"$'
    refused(match, net, str(tmp_path / 'net.onnx'), 'onnx')
    assert not list(tmp_path.iterdir())


def test_other_packages_are_not_asked_for(net, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        assert name.partition('.')[0] not in ('onnx', 'onnxruntime'), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    export(net, str(tmp_path / 'net.pt'), 'torchscript', (6, 7))


def test_existing_file(net, tmp_path):
    out = tmp_path / 'net.pt'
    out.write_text('precious')
    refused('output exists', net, str(out), 'torchscript', (6, 7))
    assert out.read_text() == 'precious'
    export(net, str(out), 'torchscript', (6, 7), overwrite=True)
    assert out.read_bytes()[:2] == b'PK'


@pytest.mark.parametrize('tolerance', [0.0, 1e-12])
def test_difference_above_the_tolerance(net, tolerance, tmp_path):
    out = str(tmp_path / 'net.pt')
    match = 'more than the tolerance .*in output.*nothing written'
    refused(match, net, out, 'torchscript', (16, 17), tolerance=tolerance)
    assert not list(tmp_path.iterdir())


def test_norms_before_convolutions_stay(tmp_path):
    """The order of attributes says nothing about that of the data."""

    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(self.norm(x))

    out = str(tmp_path / 'net.pt')
    result = export(randomize(Crossed()), out, 'torchscript', (6, 7))
    assert result.difference.largest < SINGLE


def test_head_of_what_is_no_detector(net, model_of, tmp_path):
    out = str(tmp_path / 'net.onnx')
    match = 'head=True is for detectors, not for {}'
    refused(match.format('Backbone'), net, out, head=True)
    segmentor = model_of('segmentor')
    refused(match.format('EncoderDecoder'), segmentor, out, head=True)


def test_detector_without_dense_head(model_of, tmp_path):
    model = copy.deepcopy(model_of('detector'))
    del model.rpn_head
    out = str(tmp_path / 'net.onnx')
    refused('has no dense head', model, out, head=True)


def test_image_size_that_does_not_fit(tmp_path):
    model = nn.Sequential(DBB(3, 4, 3))
    out = str(tmp_path / 'net.pt')
    match = r'cannot be run on images of shape \(1, 3, 2, 2\)'
    refused(match, model, out, 'torchscript', (2, 2))


def test_images_of_another_size(net, tmp_path):
    out = str(tmp_path / 'net.pt')
    match = r'of shape \(3, 6, 6\) as they enter .* for \(3, 6, 7\); choose'
    x = torch.zeros(1, 3, 6, 6)
    refused(match, net, out, 'torchscript', (6, 7), images=[x])


class Odd(nn.Module):
    def forward(self, x):
        return x, 'text'


def test_outputs_that_are_no_tensors(tmp_path):
    out = str(tmp_path / 'net.pt')
    refused('returns a str', Odd(), out, 'torchscript', (6, 7))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize('format', ['onnx', 'torch.export'])
def test_network_that_cannot_be_exported(format, tmp_path):
    out = str(tmp_path / f'net{FORMATS[format].suffix}')
    match = f'Branching cannot be exported as {format}: '
    refused(match, Branching(), out, format, (6, 7))
    assert not list(tmp_path.iterdir())


# From a checkpoint, and as a command


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    config = write_config(folder, 'classifier')
    return config, write_checkpoint(config, folder / 'trained.pth')


SIZES = ['--image-size', *map(str, SIZE)]


def test_command(trained, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / 'net.onnx')
    arguments = [*trained, out, '--format', 'onnx', *SIZES]
    monkeypatch.setattr(sys, 'argv', ['reparam.py', *arguments])
    runpy.run_path(str(TOOL), run_name='__main__')
    text = capsys.readouterr().out
    assert 'merged 8 blocks before the export' in text
    assert "input:   images ('batch', 3, 64, 48)" in text
    assert "output:  logits ('batch', 3)" in text
    assert f'onnx: {out}' in text
    assert [path.name for path in tmp_path.iterdir()] == ['net.onnx']
    # The network that was trained, by the file alone.
    model = build_model(Config.fromfile(trained[0]))
    model.load_state_dict(torch.load(trained[1])['state_dict'])
    x = image(3, 3, *SIZE, dtype=torch.float32)
    expected = expected_of(model, x, False)[0]
    assert distance(run_onnx(out, x)['logits'], expected) < SINGLE


@pytest.mark.parametrize(
    ('out', 'more', 'message'),
    [
        ('net.pth', ['--format', 'onnx'], 'the output must end in .onnx'),
        ('net.pth', ['--format', 'tflite'], 'invalid choice'),
        (
            'net.pt',
            ['--format', 'torchscript', '--skip', 'x'],
            '--only and --skip leave blocks',
        ),
        ('net.pt', ['--format', 'torchscript', '--head'], 'is for detectors'),
        ('net.pth', ['--head'], '--head is not for the format stock'),
    ],
)
def test_command_with_a_mistake(
    trained, out, more, message, tmp_path, monkeypatch, capsys
):
    arguments = [*trained, str(tmp_path / out), *more, *SIZES]
    monkeypatch.setattr(sys, 'argv', ['reparam.py', *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name='__main__')
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_a_detector(tmp_path):
    config = write_config(tmp_path, 'detector')
    checkpoint = write_checkpoint(config, tmp_path / 'trained.pth')
    out = tmp_path / 'net.pt'
    size = (64, 64)  # a multiple of what the preprocessor pads to
    result = export_checkpoint(
        Source(Config.fromfile(config), checkpoint),
        str(out),
        'torchscript',
        head=True,
        proof=Proof(image_size=size),
    )
    assert result.metadata['merged_blocks'] == 14
    assert result.metadata['weights'] == 'the only ones, state_dict'
    digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    assert result.metadata['source_sha256'] == digest
    model = build_model(Config.fromfile(config))
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    x = image(1, 3, *size, dtype=torch.float32)
    found = run_torchscript(str(out), x)
    for y, expect in zip(found.values(), expected_of(model, x, True)):
        assert distance(y, expect) < SINGLE


def test_image_size_that_the_preprocessor_changes(tmp_path):
    config = write_config(tmp_path, 'detector')
    checkpoint = write_checkpoint(config, tmp_path / 'trained.pth')
    with pytest.raises(
        UserError, match=r'\(3, 64, 64\) as they .*\(3, 64, 48'
    ):
        export_checkpoint(
            Source(Config.fromfile(config), checkpoint),
            str(tmp_path / 'net.pt'),
            'torchscript',
            proof=Proof(image_size=(64, 48)),
        )
    assert not (tmp_path / 'net.pt').exists()


def test_output_that_is_the_checkpoint(trained, tmp_path):
    config, checkpoint = trained
    source = tmp_path / 'trained.pt'
    source.write_bytes(Path(checkpoint).read_bytes())
    cfg = Config.fromfile(config)
    with pytest.raises(UserError, match='is also an input'):
        export_checkpoint(
            Source(cfg, str(source)),
            str(source),
            'torchscript',
            overwrite=True,
        )


@pytest.mark.parametrize(
    'scope, model, shapes',
    [
        ('mmseg', pointrend, {'logits': (3, *SIZE)}),
        (
            'mmpretrain',
            byol,
            {'feature_0': (8, 16, 12), 'feature_1': (16, 8, 6)},
        ),
        ('mmdet', detr, {'feature_0': (16, 8, 6)}),
    ],
)
def test_networks_whose_heads_read_more_than_features(
    tmp_path, scope, model, shapes
):
    network = randomize(
        build_model(Config(dict(default_scope=scope, model=model())))
    )
    out = str(tmp_path / 'net.pt')
    result = export(network, out, 'torchscript', SIZE)
    assert result.outputs == shapes
    assert result.difference.largest < 1e-4


def test_a_head_that_does_not_run(tmp_path):
    cfg = Config(dict(default_scope='mmdet', model=sparse_rcnn()))
    network, out = build_model(cfg), str(tmp_path / 'net.pt')
    refused(
        'NotImplementedError: .*head is left out',
        network,
        out,
        'torchscript',
        SIZE,
        head=True,
    )
    export(network, out, 'torchscript', SIZE)


def test_other_packages_blocks(tmp_path):
    """The file holds the merged form of mmpretrain's own blocks."""
    arch = dict(
        num_blocks=[1] * 4,
        width_factor=[0.125] * 4,
        group_layer_map=None,
        se_cfg=None,
    )
    model = dict(
        type='ImageClassifier', backbone=dict(type='RepVGG', arch=arch)
    )
    cfg = Config(dict(default_scope='mmpretrain', model=model))
    path = str(tmp_path / 'trained.pth')
    torch.save(randomize(build_model(cfg)).state_dict(), path)
    out = str(tmp_path / 'net.pt')
    export_checkpoint(
        Source(cfg, path), out, 'torchscript', proof=Proof(image_size=SIZE)
    )
    names = [name for name, _ in torch.jit.load(out).named_modules()]
    assert any('branch_reparam' in name for name in names)
    assert not any('branch_3x3' in name for name in names)
