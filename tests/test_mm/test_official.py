"""The papers' files give the papers' outputs; what is wrong says so.

The files are those of the papers' own code for tiny networks, and what that
code computes with them. More of them are tested where the variable
MMDBB_REFERENCE names the folder that they were taken from.
"""

import functools
import json
import lzma
import os
import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import deploy, distance, randomize
from helpers import run_tool as tool
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from mmpretrain import get_model
from mmpretrain.registry import MODELS
from PIL import Image
from torch import nn
from torchvision import transforms as T

from mmdbb import DiverseBranchBlock, RepVGGBlock_OREPA
from mmdbb.errors import UserError
from mmdbb.files import hdf5
from mmdbb.mm.backbones import MobileNetV1, PlainResNet, ResNetDBB
from mmdbb.mm.deploy.load import load_deployed
from mmdbb.mm.official import convert as official
from mmdbb.mm.official.convert import (
    backbone_state,
    convert_official,
    load_official_backbone_,
    read_official,
)
from mmdbb.mm.official.recognise import recognise
from mmdbb.mm.stock.config import stock_config
from mmdbb.reparam import find_blocks

pytestmark = pytest.mark.usefixtures('quiet')

DATA = Path(__file__).resolve().parents[1] / 'data' / 'official'
#: utils.py of the papers' code
VAL_PREPROCESS = T.Compose(
    [
        T.Resize(256),
        T.CenterCrop(224),
        T.ToTensor(),
        T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
HOME = Path(__file__).resolve().parents[2]
TOOL = HOME / 'tools' / 'convert_official.py'
TOLERANCE = 1e-5  # of the output's largest magnitude, float32

FILES = [path.stem for path in sorted(DATA.glob('*.pth*.xz'))]
REFERENCE = os.environ.get('MMDBB_REFERENCE')
ALL_FILES = (
    [p.name for p in sorted(Path(REFERENCE, 'checkpoints').glob('*.pth*'))]
    if REFERENCE
    else []
)
KEYS = json.loads(lzma.open(DATA / 'keys.json.xz').read())
#: Of UniRepLKNet, RepLKNet and MobileOne, made by data/record_networks.py.
NEWER_KEYS = json.loads(lzma.open(DATA / 'newer_keys.json.xz').read())


def unpack(name, folder):
    path = folder / name
    path.write_bytes(lzma.open(DATA / f'{name}.xz').read())
    return str(path)


@pytest.fixture
def mobilenet(tmp_path):
    """A bare training-time file and its state."""
    path = unpack('mobilenet_dbb_train.pth.tar', tmp_path)
    return path, torch.load(path, weights_only=True)


@pytest.fixture
def resnet(tmp_path):
    path = unpack('resnet_bottleneck_dbb_train.pth.tar', tmp_path)
    return path, torch.load(path, weights_only=True)['state_dict']


@pytest.fixture
def plain(tmp_path):
    path = unpack('resnet_basic_base_train.pth.tar', tmp_path)
    return path, torch.load(path, weights_only=True)['state_dict']


def recorded(name, folder=DATA):
    case = re.sub(r'_(train|deploy)\.pth.*', '', name)
    io = np.load(folder / f'{case}_io.npz')
    return torch.from_numpy(io['input']), torch.from_numpy(io['output'])


def assert_gives_the_recorded(path, name, out, folder=DATA):
    result = convert_official(path, out)
    model = get_model(result.config, pretrained=result.checkpoint)
    x, expected = recorded(name, folder)
    with torch.no_grad():
        found = model.eval()(x)
    assert distance(found, expected) < TOLERANCE
    assert result.network.has_blocks == bool(find_blocks(model))
    return result, model


@pytest.mark.parametrize('name', FILES)
def test_file_gives_the_recorded_output(name, tmp_path):
    path = unpack(name, tmp_path)
    out = str(tmp_path / 'out.pth')
    result, _ = assert_gives_the_recorded(path, name, out)
    meta = torch.load(out, weights_only=True)['meta']['mmdbb']
    assert meta['official'] == str(result.network)
    assert result.network.merged == ('deploy' in name)


@pytest.mark.skipif(not ALL_FILES, reason='MMDBB_REFERENCE is not set')
@pytest.mark.parametrize('name', ALL_FILES)
def test_reference_file_gives_the_recorded_output(name, tmp_path):
    folder = Path(REFERENCE, 'checkpoints')
    out = str(tmp_path / 'out.pth')
    assert_gives_the_recorded(str(folder / name), name, out, folder)


def test_a_file_of_the_first_revision_gives_the_recorded_output(tmp_path):
    """Before 2021-04-06 the padded norms had other names."""
    name = 'resnet_bottleneck_dbb_train.pth.tar'
    path = Path(unpack(name, tmp_path))
    loaded = torch.load(path, weights_only=True)
    state = {
        re.sub(r'(dbb_avg\.bn|dbb_1x1_kxk\.bn1)\.bn\.', r'\1.', old): value
        for old, value in loaded['state_dict'].items()
    }
    assert len(set(state) - set(loaded['state_dict'])) > 20
    torch.save(dict(loaded, state_dict=state), path)
    assert_gives_the_recorded(str(path), name, str(tmp_path / 'out.pth'))


# Full-size names


@pytest.mark.parametrize('part', ['train', 'deploy'])
@pytest.mark.parametrize('name', KEYS)
def test_every_name_has_one_place(name, part, monkeypatch):
    # The host's ResNet reads numbers from it while it is built.
    monkeypatch.setattr(
        torch, 'linspace', functools.partial(torch.linspace, device='cpu')
    )
    with torch.device('meta'):
        state = {k: torch.zeros(s) for k, s in KEYS[name][part].items()}
        network = recognise(state, name)
        backbone = MODELS.build(network.backbone)
        found = backbone_state(network, backbone)
    places = [
        ours
        for key, layer in network.layers.items()
        for ours in layer.names(
            network.network.place(key), network.network
        ).values()
    ]
    assert len(places) == len(set(places)) == len(state) - 2
    assert set(network.head) == {'weight', 'bias'}
    shapes = {k: v.shape for k, v in backbone.state_dict().items()}
    assert {k: v.shape for k, v in found.items()} == shapes
    expected = re.sub('.*repo_|_(OREPA|DBB).*', '', name)
    assert str(network).startswith(
        {
            'MobileNet': 'MobileNet-V1,',
            'ResNet-18-1.5x': 'ResNet-18 of 96 base channels,',
            'ResNet-18-2x': 'ResNet-18 of 128 base channels,',
        }.get(expected, f'{expected},')
    )


@pytest.mark.parametrize('part', ['train', 'deploy'])
@pytest.mark.parametrize('name', NEWER_KEYS)
def test_every_name_of_the_newer_networks_has_a_place(name, part, monkeypatch):
    monkeypatch.setattr(
        torch, 'linspace', functools.partial(torch.linspace, device='cpu')
    )
    with torch.device('meta'):
        shapes = NEWER_KEYS[name][part]
        network = recognise({k: torch.zeros(s) for k, s in shapes.items()}, '')
        backbone = MODELS.build(network.backbone)
        found = backbone_state(network, backbone)
    family, _, size = name.partition('_')
    kinds = dict(
        unireplknet='UniRepLKNet', replknet='RepLKNet', mobileone='MobileOne'
    )
    size = re.sub('unireplknet_|create_RepLKNet', '', size)
    title = f'{kinds[family]}-{size.upper()}'
    block = 'no blocks' if part == 'deploy' else network.block
    structure = 'converted' if part == 'deploy' else 'training-time'
    assert str(network) == f'{title}, {block}, {structure}'
    assert network.backbone['arch'].lower() == size.lower()
    assert set(network.head) == {'weight', 'bias'}
    expected = {k: v.shape for k, v in backbone.state_dict().items()}
    assert {k: v.shape for k, v in found.items()} == expected
    # Nothing is made up but the norms that were folded.
    if part == 'train':
        assert len(found) == len(shapes) - 2


@pytest.fixture(params=['unireplknet', 'replknet', 'mobileone'])
def newer(request, tmp_path):
    """A training-time file of one of these networks, and its state."""
    path = unpack(f'{request.param}_train.pth', tmp_path)
    state = torch.load(path, weights_only=True)
    return path, state.get('model', state)


def test_newer_networks_start_detectors(newer):
    """Norms of outputs that the file does not have start anew."""
    path, state = newer
    backbone = recognise(dict(state), path).backbone
    maps = dict(backbone, out_indices=(0, 1, 2, 3))
    if 'UniRepLKNet' in backbone['type']:
        maps['gap_before_final_norm'] = False
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        one, other = MODELS.build(maps), MODELS.build(backbone)
    for model in (one, other):
        load_official_backbone_(model, path)
        model.eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        *_, last = one(x)
        (expected,) = other(x)
    assert len(one(x)) == 4
    if 'UniRepLKNet' not in backbone['type']:
        assert torch.equal(last, expected)
    others = [
        value
        for name, value in one.state_dict().items()
        if re.match(r'norm[012]|stages\.[012]\.norm', name)
    ]
    assert all(v.min() == v.max() and v.min() in (0, 1) for v in others)


@pytest.mark.parametrize(
    'kind', ['missing', 'unknown', 'half merged', 'lost', 'flat']
)
def test_what_is_wrong_in_a_newer_file(newer, kind, tmp_path):
    path, state = newer
    name = next(n for n in state if 'stage' in n and n.endswith('weight'))
    merged = torch.load(
        unpack(Path(path).name.replace('train', 'deploy'), tmp_path),
        weights_only=True,
    )
    unit = re.compile(r'(stages\.2\.0\.|stages\.2\.blocks\.0\.|stage2\.0\.)')
    if kind == 'missing':
        del state[name]
        message = 'lacks|missing'
    elif kind == 'unknown':
        state['stages.0.extra.weight'] = torch.ones(1)
        message = 'extra'
    elif kind == 'half merged':
        state = {k: v for k, v in state.items() if not unit.match(k)}
        state.update({k: v for k, v in merged.items() if unit.match(k)})
        message = 'neither a training-time nor a converted file: 1 of its'
    elif kind == 'lost':
        state = {k: v for k, v in state.items() if not unit.match(k)}
        message = 'lacks|missing'
    else:
        state = {k: v.flatten()[0] for k, v in state.items()}
        message = 'kernels of other shapes'
    torch.save(state, path)
    with pytest.raises(UserError, match=message):
        convert_official(path, str(tmp_path / 'out.pth'))


def test_stock_networks_need_no_mmdbb():
    state = {
        k: torch.zeros(s)
        for k, s in KEYS['dbb_repo_ResNet-18_DBB']['deploy'].items()
    }
    network = recognise(state, 'file')
    assert network.backbone == dict(type='mmpretrain.ResNet', depth=18)
    assert 'custom_imports' not in official.classifier_config(network)
    head = official.classifier_config(network).model.head
    assert (head.num_classes, head.in_channels) == (1000, 512)


def official_layer(block, args):
    """A layer of the papers' networks, and its state under their names."""
    if block is None:
        layer = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(*args, bias=False), bn=nn.BatchNorm2d(args[1])
            )
        )
        return layer, layer.state_dict()
    layer = OFFICIAL[block](*args, nonlinear=nn.Identity())
    state = {}
    for name, value in layer.state_dict().items():
        theirs, ours = next(n for n in layer.names if name.startswith(n[1]))
        state[theirs + name[len(ours) :]] = value
    return layer, state


OFFICIAL = dict(DBB=DiverseBranchBlock, OREPARepVGG=RepVGGBlock_OREPA)


@pytest.mark.parametrize('block', [None, *OFFICIAL])
def test_repvgg_of_each_block(block, tmp_path):
    """RepVGG's training code has these blocks; not all files are recorded."""
    widths = (4, 4, 4, 8, 8)
    layers, state, inside = nn.Sequential(), {}, 3
    for stage, count in enumerate((1, 1, 2, 1, 1)):
        for index in range(count):
            args = (inside, widths[stage], 3, 1 if index else 2, 1)
            layer, entries = official_layer(block, args)
            layers.extend([layer, nn.ReLU()])
            name = f'stage{stage}.{index}' if stage else 'stage0'
            state.update({f'{name}.{k}': v for k, v in entries.items()})
            inside = widths[stage]
    randomize(layers).eval()
    state.update({'linear.weight': torch.eye(8), 'linear.bias': torch.ones(8)})
    path = str(tmp_path / 'file.pth')
    torch.save(state, path)
    result = convert_official(path, str(tmp_path / 'out.pth'))
    assert result.network.block == block and not result.network.merged
    model = get_model(result.config, pretrained=result.checkpoint).eval()
    x = torch.rand(2, 3, 70, 66)
    with torch.no_grad():
        expected = layers(x).mean((2, 3)) + 1
        assert distance(model(x), expected) < TOLERANCE


# What is written


def test_written_network_merges_to_the_plain_one(resnet, tmp_path):
    result = convert_official(resnet[0], str(tmp_path / 'out.pth'))
    merged = deploy(
        Config.fromfile(result.config),
        result.checkpoint,
        str(tmp_path / 'plain.pth'),
        image_size=(64, 64),
    )
    model = load_deployed(merged.config, merged.checkpoint)
    assert type(model.backbone) is PlainResNet
    x, expected = recorded('resnet_bottleneck_dbb_train.pth.tar')
    with torch.no_grad():
        assert distance(model(x), expected) < TOLERANCE


def test_custom_class_count(mobilenet, tmp_path):
    path, state = mobilenet
    state['linear.weight'] = torch.ones(3, 32)
    state['linear.bias'] = torch.arange(3.0)
    torch.save(state, path)
    result = convert_official(path, str(tmp_path / 'out.pth'))
    model = get_model(result.config, pretrained=result.checkpoint)
    assert model.head.num_classes == 3
    assert torch.equal(model.head.fc.bias, torch.arange(3.0))


def test_imagenet_networks_are_tested_as_the_papers_do(
    mobilenet, tmp_path, monkeypatch, capsys
):
    path, state = mobilenet
    state['linear.weight'] = torch.rand(1000, 32)
    state['linear.bias'] = torch.rand(1000)
    torch.save(state, path)
    result = convert_official(path, str(tmp_path / 'out.pth'))
    cfg = Config.fromfile(result.config)
    recipe = Config.fromfile(HOME / 'configs' / 'mobilenet_dbb_imagenet.py')
    ours, recipes = (c.test_dataloader.dataset for c in (cfg, recipe))
    assert ours.pipeline == recipes.pipeline
    for key, value in recipe.data_preprocessor.items():
        assert cfg.model.data_preprocessor[key] == value
    # The command, on two photographs in the data set's layout.
    datasets = pytest.importorskip('sklearn.datasets')
    model = get_model(cfg, pretrained=result.checkpoint).eval()
    folder = tmp_path / 'imagenet' / 'val'
    folder.mkdir(parents=True)
    lines = []
    for name in ('china.jpg', 'flower.jpg'):
        image = Image.fromarray(datasets.load_sample_image(name))
        image.save(folder / name)
        image = Image.open(folder / name)
        pixels = VAL_PREPROCESS(image)[None]
        with torch.no_grad():
            lines.append(f'{name} {model(pixels).argmax().item()}')
    (tmp_path / 'imagenet' / 'meta').mkdir()
    text = '\n'.join(lines)
    (tmp_path / 'imagenet' / 'meta' / 'val.txt').write_text(text)
    monkeypatch.chdir(tmp_path)
    options = (
        f'test_dataloader.dataset.data_root={tmp_path / "imagenet"}',
        'test_dataloader.num_workers=0',
        'test_evaluator.topk=(1,)',
    )
    metrics = tmp_path / 'metrics'
    code = tool(
        'test',
        result.config,
        result.checkpoint,
        '--work-dir',
        metrics,
        '--cfg-options',
        *options,
    )
    assert code == 0
    (report,) = metrics.glob('*/*.json')
    assert json.loads(report.read_text())['accuracy/top1'] == 100


def test_source_is_untouched_and_named(mobilenet, tmp_path):
    path, _ = mobilenet
    before = Path(path).read_bytes()
    out = str(tmp_path / 'out.pth')
    convert_official(path, out)
    assert Path(path).read_bytes() == before
    with pytest.raises(UserError, match='output exists'):
        convert_official(path, out)
    convert_official(path, out, overwrite=True)


@pytest.mark.parametrize('listed', [False, True])
def test_stock_config_starts_from_nothing(listed):
    rule = dict(type='OfficialPretrained', checkpoint='file.pth')
    other = dict(type='Kaiming', layer='Conv2d')
    cfg = dict(
        type='mmpretrain.ResNetDBB',
        depth=18,
        init_cfg=[other, rule] if listed else rule,
    )
    found = stock_config(Config(dict(model=dict(backbone=cfg))))
    expected = [other] if listed else None
    assert found.model.backbone.init_cfg == expected


@pytest.mark.parametrize('name', ['ResNetDBB', 'ResNeXtDBB'])
@pytest.mark.parametrize('blocks', [None, (1, 2, 1, 1)])
def test_stage_blocks_stay(name, blocks):
    cfg = dict(type=f'mmpretrain.{name}', depth=50, stage_blocks=blocks)
    found = stock_config(Config(dict(model=dict(backbone=cfg))))
    plain = name.replace('DBB', '')
    if blocks is None:
        expected = dict(type=f'mmpretrain.{plain}', depth=50)
        assert 'custom_imports' not in found
    else:
        expected = dict(cfg, type=f'mmpretrain.Plain{plain}')
        assert found.custom_imports.imports == ['mmdbb.backbones']
    assert found.model.backbone == expected


# Forms of files


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('bare', [True, False])
def test_prefix_and_form(prefix, bare, plain, tmp_path):
    state = {
        prefix + re.sub('^module.', '', k): v for k, v in plain[1].items()
    }
    path = str(tmp_path / 'file.pth')
    torch.save(state if bare else dict(state_dict=state, epoch=3), path)
    found = read_official(path)
    assert list(found) == [k.replace('module.', '') for k in plain[1]]


def test_prefix_in_the_middle_stays(plain, tmp_path):
    _, state = plain
    state = {
        k.replace('stage2.0.', 'stage2.module.0.'): v for k, v in state.items()
    }
    path = str(tmp_path / 'file.pth')
    torch.save(state, path)
    assert 'stage2.module.0.conv1.conv.weight' in read_official(path)
    with pytest.raises(UserError, match=r'stage2\.module\.0\.shortcut'):
        recognise(read_official(path), path)


def test_old_files_without_counters(resnet, tmp_path):
    path, state = resnet
    old = {k: v for k, v in state.items() if not k.endswith('tracked')}
    assert len(old) < len(state)
    torch.save(old, path)
    model = ResNetDBB(
        50, stem_channels=4, base_channels=4, stage_blocks=(1, 2, 1, 1)
    )
    load_official_backbone_(model, path)


@pytest.mark.parametrize('left_out', ['', 'stage0.'])
def test_hdf5(left_out, plain, tmp_path):
    h5py = pytest.importorskip('h5py')
    path = str(tmp_path / 'file.hdf5')
    with h5py.File(path, 'w') as file:
        for name, value in plain[1].items():
            name = name.replace('module.', '')
            if left_out and name.startswith(left_out):
                name = name[len(left_out) :]
            file.create_dataset(name, data=value.numpy())
    out = str(tmp_path / 'out.pth')
    assert_gives_the_recorded(path, 'resnet_basic_base_train.pth.tar', out)

    Path(path).write_bytes(Path(path).read_bytes()[:5000])
    with pytest.raises(UserError, match='cannot be read as hdf5'):
        read_official(path)
    with h5py.File(path, 'w') as file:
        file.create_group('stage1')
    with pytest.raises(UserError, match='stage1 is no data set'):
        read_official(path)


def test_hdf5_without_h5py(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'h5py', None)
    path = tmp_path / 'file.hdf5'
    path.write_bytes(hdf5.SIGNATURE + bytes(100))
    with pytest.raises(UserError, match='pip install h5py'):
        read_official(str(path))


# What is refused


def drop(state, pattern):
    return {k: v for k, v in state.items() if not re.search(pattern, k)}


def changed(state, name, value):
    assert name in state
    return dict(state, **{name: value})


BAD = {
    'other network': (
        lambda s: {'features.0.weight': torch.ones(4, 3, 3, 3)},
        'holds no network of the papers',
    ),
    'missing entry': (
        lambda s: drop(s, r'stem\.3\.pointwise\.bn\.bias'),
        r'missing: backbone\.layer3\.0\.pointwise_conv\.bn\.bias',
    ),
    'missing layer': (
        lambda s: drop(s, r'stem\.5\.pointwise'),
        'lacks layer stem.5.pointwise of its MobileNet-V1',
    ),
    'missing classifier': (
        lambda s: drop(s, r'linear\.bias'),
        'has no classifier',
    ),
    'extra entry': (
        lambda s: dict(s, fc=torch.ones(1)),
        'entries that it does not have: fc',
    ),
    'extra entry of a layer': (
        lambda s: dict(s, **{'conv1.dbb_2x2.weight': torch.ones(1)}),
        r'does not have: conv1\.dbb_2x2\.weight',
    ),
    'fourteenth block': (
        lambda s: dict(s, **{'stem.13.pointwise.conv.weight': torch.ones(1)}),
        r'does not have: stem\.13\.pointwise',
    ),
    'other shape': (
        lambda s: changed(s, 'conv1.dbb_1x1.bn.bias', torch.ones(5)),
        r'of another shape: backbone\.conv1\.conv\.branches\.1x1\.norm\.bias',
    ),
    'no kernel': (
        lambda s: changed(s, 'conv1.dbb_origin.conv.weight', torch.ones(4)),
        'is no kernel',
    ),
    'half merged': (
        lambda s: dict(
            drop(s, r'^conv1\.'),
            **{
                'conv1.dbb_reparam.weight': torch.ones(4, 3, 3, 3),
                'conv1.dbb_reparam.bias': torch.ones(4),
            },
        ),
        'neither a training-time nor a converted file',
    ),
    'NaN': (
        lambda s: changed(s, 'linear.bias', torch.full((10,), torch.nan)),
        'not finite: linear.bias',
    ),
    'negative variance': (
        lambda s: changed(
            s, 'stem.0.pointwise.bn.running_var', torch.full((4,), -1.0)
        ),
        'negative variance: stem.0.pointwise.bn.running_var',
    ),
    'int8': (
        lambda s: {
            k: v.to(torch.int8) if v.is_floating_point() else v
            for k, v in s.items()
        },
        'is int8',
    ),
    'empty': (lambda s: {}, 'no weights'),
    'list': (lambda s: [torch.ones(2)], 'holds a list'),
}


def run_tool(monkeypatch, capsys, *args):
    """Exit code and stderr of the tool, run in this process."""
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, args)])
    try:
        runpy.run_path(str(TOOL), run_name='__main__')
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


@pytest.mark.parametrize('case', BAD)
def test_refused(case, mobilenet, tmp_path, monkeypatch, capsys):
    change, message = BAD[case]
    folder = tmp_path / 'given'
    folder.mkdir()
    torch.save(change(mobilenet[1]), folder / 'file.pth')
    out = folder / 'out.pth'
    code, output = run_tool(monkeypatch, capsys, folder / 'file.pth', out)
    assert code == 2
    assert re.search(message, output.err), output.err
    assert output.err.count('\n') == 1 and not output.out
    assert os.listdir(folder) == ['file.pth']


def test_truncated_and_missing(mobilenet, tmp_path, monkeypatch, capsys):
    path = Path(mobilenet[0])
    out = tmp_path / 'out.pth'
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b'', b'text'):
        path.write_bytes(content)
        code, output = run_tool(monkeypatch, capsys, path, out)
        assert code == 2 and output.err.count('\n') == 1
    for wrong in (tmp_path / 'none.pth', tmp_path):
        code, output = run_tool(monkeypatch, capsys, wrong, out)
        assert code == 2 and output.err.count('\n') == 1
    path.write_bytes(whole)
    for wrong in (tmp_path / 'out.pt', path):
        code, output = run_tool(monkeypatch, capsys, path, wrong)
        assert code == 2 and output.err.count('\n') == 1
    assert os.listdir(tmp_path) == [path.name]


def test_tool_says_what_it_recognised(
    mobilenet, tmp_path, monkeypatch, capsys
):
    out = tmp_path / 'out.pth'
    code, output = run_tool(monkeypatch, capsys, mobilenet[0], out)
    assert code == 0
    assert output.out.splitlines() == [
        'recognised MobileNet-V1, DBB, training-time: 414 entries',
        f'weights: {out}',
        f'config:  {out.with_suffix(".py")}',
    ]


# From a config

INIT = 'OfficialPretrained'
RESNET = dict(depth=50, stem_channels=4, base_channels=4)
BACKBONES = {
    'mobilenet_dbb_train.pth.tar': dict(
        type='MobileNetV1DBB', channels=(4, 4, 4, 8, 16, 32)
    ),
    'mobilenet_dbb_deploy.pth': dict(
        type='MobileNetV1', channels=(4, 4, 4, 8, 16, 32)
    ),
    'resnet_bottleneck_dbb_train.pth.tar': dict(
        type='ResNetDBB', stage_blocks=(1, 2, 1, 1), **RESNET
    ),
    'resnet_basic_base_deploy.pth': dict(
        type='PlainResNet',
        stage_blocks=(2, 1, 1, 1),
        **dict(RESNET, depth=18),
    ),
}


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
@pytest.mark.parametrize('name', BACKBONES)
def test_init_cfg(scope, name, tmp_path):
    path = unpack(name, tmp_path)
    cfg = dict(BACKBONES[name], type=f'mmpretrain.{BACKBONES[name]["type"]}')
    rules = dict(type=INIT, checkpoint=path)
    if scope == 'mmdet':  # with others before it
        rules = [dict(type='Kaiming', layer='Conv2d'), rules]
    if 'ResNet' in cfg['type']:
        cfg['zero_init_residual'] = True  # must leave what was loaded
    with DefaultScope.overwrite_default_scope(scope):
        backbone = MODELS.build(dict(cfg, init_cfg=rules))
        backbone.init_weights()
    network = recognise(read_official(path), path)
    expected = backbone_state(network, backbone)
    found = backbone.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_init_cfg_inside_a_segmentor(tmp_path):
    from mmseg.registry import MODELS as SEGMENTORS

    name = 'resnet_bottleneck_dbb_train.pth.tar'
    path = unpack(name, tmp_path)
    cfg = dict(BACKBONES[name], type='mmpretrain.ResNetDBB')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = SEGMENTORS.build(
            dict(
                type='EncoderDecoder',
                backbone=dict(cfg, init_cfg=dict(type=INIT, checkpoint=path)),
                decode_head=dict(
                    type='FCNHead',
                    in_channels=128,
                    channels=4,
                    num_classes=3,
                    in_index=0,
                ),
            )
        )
        model.init_weights()
    kernel = torch.load(path, weights_only=True)['state_dict'][
        'module.stage4.0.conv2.dbb_avg.conv.weight'
    ]
    branch = model.backbone.layer4[0].conv2.branches['1x1_avg']
    assert torch.equal(branch.conv1.weight, kernel)


REPVGG = dict(
    num_blocks=(1, 2, 2, 1),
    width_factor=(1 / 16, 1 / 16, 1 / 16, 1 / 8),
    group_layer_map=None,
    se_cfg=None,
    stem_channels=4,
)


@pytest.mark.parametrize('block', ['RepVGGConv', None])
def test_repvgg_file_starts_the_recipes_backbone(block, tmp_path):
    """And mmpretrain's own, as ever."""
    name = 'orepa_repo_repvgg_repvgg_train.pth.tar'
    path = unpack(name, tmp_path)
    config = HOME / 'configs' / 'repvgg-a0_repvgg_rerun_imagenet.py'
    cfg = Config.fromfile(config).model.backbone
    assert cfg.block.type == 'RepVGGConv'
    cfg.update(arch=REPVGG, init_cfg=dict(type=INIT, checkpoint=path))
    if block is None:
        cfg.update(type='RepVGG')
        del cfg.block
    model = MODELS.build(cfg)
    model.init_weights()
    assert bool(find_blocks(model)) == bool(block)
    state = read_official(path)
    assert len(state) - 2 == len(model.state_dict())  # without linear
    x, expected = recorded(name)
    with torch.no_grad():
        model.eval()  # mmpretrain's returns nothing
        features = model(x)[0].mean((2, 3))
        found = features @ state['linear.weight'].T + state['linear.bias']
    assert distance(found, expected) < TOLERANCE
    if block is None:
        assert {'branch_norm', 'branch_3x3', 'branch_1x1'} <= {
            part for key in model.state_dict() for part in key.split('.')
        }


def test_repvgg_file_does_not_start_other_blocks(tmp_path):
    path = unpack('orepa_repo_repvgg_repvgg_train.pth.tar', tmp_path)
    cfg = dict(type='ReparamRepVGG', arch=REPVGG, block=dict(type='DBB'))
    model = MODELS.build(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match='does not fit.*missing: stem'):
        load_official_backbone_(model, path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize('part', ['train', 'deploy'])
@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_stock_resnet_of_each_host(scope, part, tmp_path):
    # ResNet-18 as in the papers, a sixteenth as wide.
    state = {}
    for name, shape in KEYS['dbb_repo_ResNet-18_DBB'][part].items():
        shape = [n // 16 if n % 64 == 0 else n for n in shape]
        if len(shape) == 4:
            fan_in = shape[1] * shape[2] * shape[3]
            state[name] = torch.randn(shape) / (2 * fan_in**0.5)
        else:
            state[name] = torch.rand(shape) if shape else torch.tensor(7)
    path = str(tmp_path / 'file.pth')
    torch.save(state, path)
    with DefaultScope.overwrite_default_scope(scope):
        backbone = ROOT_MODELS.build(
            dict(
                type=f'{scope}.ResNet',
                depth=18,
                stem_channels=4,
                base_channels=4,
                conv_cfg=dict(type='DBB') if part == 'train' else None,
                init_cfg=dict(type=INIT, checkpoint=path),
            )
        )
        backbone.init_weights()
    reference = MODELS.build(
        dict(type='ResNetDBB', depth=18, stem_channels=4, base_channels=4)
    )
    if part == 'deploy':
        reference.switch_to_deploy()
    load_official_backbone_(reference, path)
    x = torch.randn(2, 3, 64, 64)
    backbone.train(False)  # returns nothing
    with torch.no_grad():
        found = backbone(x)[-1]
        assert distance(found, reference.eval()(x)[-1]) < TOLERANCE


def test_norms_behind_the_blocks_do_nothing(mobilenet):
    path, _ = mobilenet
    kept = MobileNetV1(
        channels=(4, 4, 4, 8, 16, 32), conv_cfg=dict(type='DBB')
    )
    absorbed = MODELS.build(BACKBONES['mobilenet_dbb_train.pth.tar'])
    x, _ = recorded('mobilenet_dbb_train.pth.tar')
    outputs = []
    for model in (randomize(kept), absorbed):
        load_official_backbone_(model, path)
        with torch.no_grad():
            outputs.append(model.eval()(x)[0])
    assert distance(*outputs) < TOLERANCE


def test_bias_of_a_merged_backbone(mobilenet, tmp_path):
    path = unpack('mobilenet_dbb_deploy.pth', tmp_path)
    cfg = BACKBONES['mobilenet_dbb_train.pth.tar']
    model = MODELS.build(dict(cfg, deploy=True))
    plain = MODELS.build(BACKBONES['mobilenet_dbb_deploy.pth'])
    x, _ = recorded('mobilenet_dbb_deploy.pth')
    outputs = []
    for each in (model, plain):
        load_official_backbone_(each, path)
        with torch.no_grad():
            outputs.append(each.eval()(x)[0])
    assert distance(*outputs) < TOLERANCE


@pytest.mark.parametrize(
    'name, cfg, message',
    [
        (
            'mobilenet_dbb_train.pth.tar',
            BACKBONES['mobilenet_dbb_deploy.pth'],
            'fits a backbone such as mmpretrain.MobileNetV1DBB, got a '
            'MobileNetV1 without blocks',
        ),
        (
            'mobilenet_dbb_deploy.pth',
            BACKBONES['mobilenet_dbb_train.pth.tar'],
            'got a MobileNetV1DBB with blocks',
        ),
        (
            'mobilenet_dbb_deploy.pth',
            dict(type='MobileNetV1', base_channels=4),
            'of another shape',
        ),
        (
            'resnet_basic_base_deploy.pth',
            BACKBONES['mobilenet_dbb_deploy.pth'],
            'missing',
        ),
    ],
)
def test_file_that_does_not_fit_the_backbone(name, cfg, message, tmp_path):
    path = unpack(name, tmp_path)
    with pytest.raises(UserError, match=message):
        load_official_backbone_(MODELS.build(cfg), path)


@pytest.mark.parametrize('other', ['Kaiming', 'Pretrained'])
def test_rules_that_would_overwrite_are_refused(other, tmp_path):
    path = unpack('mobilenet_dbb_deploy.pth', tmp_path)
    more = dict(
        Kaiming=dict(type='Kaiming', layer='Conv2d'),
        Pretrained=dict(type='Pretrained', checkpoint=path),
    )[other]
    rules = [dict(type=INIT, checkpoint=path), more]
    model = MODELS.build(
        dict(BACKBONES['mobilenet_dbb_deploy.pth'], init_cfg=rules)
    )
    with pytest.raises(UserError, match='must be the last of the list'):
        model.init_weights()
