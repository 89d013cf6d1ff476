"""From a trained checkpoint to the stock network's files, or to nothing."""

import hashlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import mmpretrain
import numpy as np
import pytest
import torch
from helpers import blocks_of, deploy, distance, image
from mmengine.config import Config
from mmengine.utils import digit_version
from networks import CONFIGS, SIZE, write_checkpoint, write_config
from torch import nn

from mmdbb import load_deployed
from mmdbb.errors import UserError
from mmdbb.files import checkpoints
from mmdbb.files.torch_files import read_torch
from mmdbb.mm import outputs
from mmdbb.mm.deploy import checkpoint as deploying
from mmdbb.mm.deploy import merge, parts
from mmdbb.mm.deploy.load import build_model, network_of

pytestmark = pytest.mark.usefixtures('quiet')
TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'reparam.py'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Task -> a folder with config.py and trained.pth; not to be changed."""
    folders = {}
    for task in CONFIGS:
        folders[task] = tmp_path_factory.mktemp(task)
        config = write_config(folders[task], task)
        write_checkpoint(config, folders[task] / 'trained.pth')
    return folders


def picture(path, seed=0, shape=(40, 30, 3)):
    import mmcv

    generator = np.random.default_rng(seed)
    mmcv.imwrite(generator.integers(0, 256, shape, dtype=np.uint8), str(path))
    return str(path)


def run(trained, out, task='classifier', **options):
    folder = trained[task]
    options.setdefault('image_size', SIZE)
    return deploy(
        Config.fromfile(folder / 'config.py'),
        options.pop('checkpoint', str(folder / 'trained.pth')),
        str(out),
        **options,
    )


@pytest.mark.parametrize('task', CONFIGS)
@pytest.mark.parametrize('fuse', [False, True])
def test_deploys(trained, tmp_path, task, fuse):
    out = tmp_path / 'sub' / 'out.pth'
    images = [picture(tmp_path / 'a.png'), picture(tmp_path / 'b.jpg', 1)]
    result = run(trained, out, task, fuse=fuse, images=images)
    assert sorted(os.listdir(out.parent)) == ['out.pth', 'out.py']
    assert result.checkpoint == str(out)
    assert result.config == str(out.with_suffix('.py'))
    assert 0 < result.difference.largest < 1e-4
    before, after = result.parameters

    model = build_model(Config.fromfile(trained[task] / 'config.py'))
    state = torch.load(trained[task] / 'trained.pth')['state_dict']
    model.load_state_dict(state)
    assert result.blocks == len(blocks_of(model))
    assert before == sum(p.numel() for p in model.parameters()) > after

    loaded = load_deployed(result.config, result.checkpoint)
    assert not loaded.training
    assert after == sum(p.numel() for p in loaded.parameters())
    norms = [m for m in loaded.modules() if 'BatchNorm' in str(type(m))]
    assert bool(norms) is not fuse
    x = image(2, 3, 40, 56, dtype=torch.float32)
    for a, b in zip(loaded.extract_feat(x), model.extract_feat(x)):
        assert distance(a, b) < 1e-4


def test_meta(trained, tmp_path):
    result = run(trained, tmp_path / 'out.pth')
    loaded = torch.load(result.checkpoint, weights_only=True)
    meta = loaded['meta']
    assert meta['epoch'] == 3
    assert 'DBB' not in meta['cfg'] and 'mmpretrain.ResNet' in meta['cfg']
    own = meta['mmdbb']
    source = (trained['classifier'] / 'trained.pth').read_bytes()
    assert own['source_sha256'] == hashlib.sha256(source).hexdigest()
    assert own['structure'] == 'stock'
    assert own['max_error'] == result.difference.largest
    assert own['tolerance'] == 1e-9
    fused = run(trained, tmp_path / 'fused.pth', fuse=True)
    meta = torch.load(fused.checkpoint)['meta']
    assert meta['mmdbb']['structure'] == 'fused'


@pytest.mark.parametrize('fuse', [False, True])
def test_a_deep_stem_becomes_that_of_mmseg(tmp_path, fuse):
    cfg = Config.fromstring(CONFIGS['segmentor'], '.py')
    cfg.custom_imports.imports = ['mmdbb.backbones']
    cfg.model.backbone = dict(
        type='mmpretrain.ResNetV1cDBB',
        depth=18,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 2),
        out_indices=(0, 1),
        base_channels=8,
        stem_channels=8,
        contract_dilation=True,
    )
    cfg.dump(tmp_path / 'config.py')
    checkpoint = write_checkpoint(tmp_path / 'config.py', tmp_path / 't.pth')
    result = deploy(
        Config.fromfile(tmp_path / 'config.py'),
        checkpoint,
        str(tmp_path / 'out.pth'),
        fuse=fuse,
        image_size=(48, 64),
    )
    backbone = load_deployed(result.config, result.checkpoint).backbone
    assert type(backbone).__module__.startswith('mmseg.')
    assert backbone.stem[3].weight.any()
    assert 0 < result.difference.largest < 1e-4


def test_inputs_are_not_changed(trained, tmp_path):
    folder = trained['classifier']
    before = {p: p.read_bytes() for p in folder.iterdir()}
    run(trained, tmp_path / 'out.pth')
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_overwrite(trained, tmp_path):
    out = tmp_path / 'out.pth'
    out.write_text('old')
    run(trained, out, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ['out.pth', 'out.py']
    assert torch.load(out)['meta']['mmdbb']


def test_random_images_are_the_seed_s(trained, tmp_path):
    errors = [
        run(trained, tmp_path / f'{i}.pth', seed=0).difference.largest
        for i in range(2)
    ]
    assert errors[0] == errors[1]


# Mistakes: a message each, and nothing left behind

LIVE = 'backbone.layer1.0.conv1.branches.kxk.conv.weight'


def changed(change):
    """A checkpoint in which something is not as it should be."""

    def make(folder, state):
        change(state)
        torch.save(dict(state_dict=state), folder / 'bad.pth')

    return make


def spoiled(value):
    def change(state):
        state[LIVE][0, 0, 0, 0] = value

    return changed(change)


def variance(state):
    name = 'backbone.layer1.0.conv1.branches.kxk.norm.running_var'
    state[name][0] = -1


def other_names(state):
    for name in list(state):
        state[f'net.{name}'] = state.pop(name)


def overflow(state):
    for name in (LIVE, LIVE.replace('conv.weight', 'norm.weight')):
        state[name].fill_(1e30)


def content(data):
    return lambda folder, _: (folder / 'bad.pth').write_bytes(data)


def truncated(folder, state):
    torch.save(dict(state_dict=state), folder / 'bad.pth')
    data = (folder / 'bad.pth').read_bytes()
    (folder / 'bad.pth').write_bytes(data[: len(data) // 2])


CHECKPOINTS = {
    'missing': (lambda *_: None, 'checkpoint not found: .*bad.pth'),
    'empty': (content(b''), 'checkpoint is empty: '),
    'text': (content(b'hello ' * 50), 'is not a checkpoint, or is trunc'),
    'truncated': (truncated, 'is not a checkpoint, or is truncated'),
    'folder': (
        lambda folder, _: (folder / 'bad.pth').mkdir(),
        'checkpoint is a folder',
    ),
    'missing key': (
        changed(lambda s: s.pop(LIVE)),
        f'does not fit the network of the config; missing: {LIVE}',
    ),
    'extra key': (
        changed(lambda s: s.update(more=torch.ones(1))),
        'does not fit .*unexpected: more',
    ),
    'wrong shape': (
        changed(lambda s: s.update({LIVE: torch.ones(8, 8, 5, 5)})),
        r'of another shape: .*\(8, 8, 5, 5\) in the file, \(8, 8, 3, 3\)',
    ),
    'nan': (spoiled(float('nan')), f'values that are not finite: {LIVE}'),
    'inf': (spoiled(float('-inf')), f'values that are not finite: {LIVE}'),
    'negative variance': (
        changed(variance),
        'negative variance: .*conv1.branches.kxk.norm.running_var',
    ),
    'plain network': (
        changed(lambda s: [s.pop(k) for k in list(s) if '.branches.' in k]),
        'is merged already, or is of a plain network',
    ),
    'another network': (
        changed(other_names),
        'does not fit .*other parts: net in the file, backbone',
    ),
    'overflow': (
        changed(overflow),
        'bad.pth: cannot merge backbone.layer1.0.conv1: .*not finite',
    ),
    'int8': (
        changed(lambda s: s.update({LIVE: s[LIVE].to(torch.int8)})),
        rf'of another type: {LIVE} \(int8 in the file, float32 in the netw',
    ),
    'quantized': (
        changed(
            lambda s: s.update(
                {LIVE: torch.quantize_per_tensor(s[LIVE], 0.1, 0, torch.qint8)}
            )
        ),
        f'entries that are quantized .qint8.: {LIVE}',
    ),
    'wider': (
        changed(
            lambda s: s.update(
                {k: torch.cat([v, v]) for k, v in s.items() if v.dim()}
            )
        ),
        r'of another shape: backbone.conv1.weight \(\(16, 3, 7, 7\) in the f',
    ),
}


@pytest.fixture
def nothing_left(tmp_path):
    """A folder for the output; the test must leave it as it was."""
    folder = tmp_path / 'outputs'
    folder.mkdir()
    yield folder
    assert os.listdir(folder) == []


@pytest.mark.parametrize('case', CHECKPOINTS)
def test_bad_checkpoints(trained, tmp_path, nothing_left, case):
    make, message = CHECKPOINTS[case]
    state = torch.load(trained['classifier'] / 'trained.pth')['state_dict']
    make(tmp_path, state)
    with pytest.raises(UserError, match=message) as error:
        run(
            trained,
            nothing_left / 'deep' / 'out.pth',
            checkpoint=str(tmp_path / 'bad.pth'),
        )
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('fuse', [False, True])
def test_merged_already(trained, tmp_path, nothing_left, fuse):
    result = run(trained, tmp_path / 'one.pth', fuse=fuse)
    kind = 'fused' if fuse else 'stock'
    with pytest.raises(UserError, match=f'merged already .structure: {kind}'):
        run(
            trained,
            nothing_left / 'out.pth',
            checkpoint=result.checkpoint,
        )


BAD_CONFIGS = {
    'no model': ('x = 1', 'the config has no model'),
    'no blocks': (
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='ImageClassifier', "
        "backbone=dict(type='ResNet', depth=18))",
        'has no block to merge: no conv_cfg and no backbone of mmdbb',
    ),
    'a part that ignores conv_cfg': (
        "default_scope = 'mmseg'\n"
        "model = dict(type='EncoderDecoder', "
        "backbone=dict(type='ResNet', depth=18), decode_head=dict("
        "type='DDRHead', in_channels=8, channels=8, num_classes=2, "
        "norm_cfg=dict(type='BN'), conv_cfg=dict(type='DBB')))",
        'conv_cfg is set in decode_head, but DDRHead builds no layer of it',
    ),
    'unknown type': (
        "model = dict(type='mmpretrain.NoSuchNet')",
        'cannot build the model of the config: .*NoSuchNet',
    ),
    'unknown key': (
        "model = dict(type='mmpretrain.ResNetDBB', depth=18, colour=1)",
        'cannot build the model of the config: .*colour',
    ),
    'unknown branch': (
        "model = dict(type='mmpretrain.ResNetDBB', depth=18, "
        "block=dict(type='DBB', branches=['3x3']))",
        "cannot build the model of the config: .*unknown branch '3x3'",
    ),
    'wrong depth': (
        "model = dict(type='mmpretrain.ResNetDBB', depth=19)",
        'cannot build the model of the config: .*19',
    ),
}


@pytest.mark.parametrize('case', BAD_CONFIGS)
def test_bad_configs(trained, nothing_left, case):
    text, message = BAD_CONFIGS[case]
    with pytest.raises(UserError, match=message):
        deploy(
            Config.fromstring(text, '.py'),
            str(trained['classifier'] / 'trained.pth'),
            str(nothing_left / 'out.pth'),
        )


def test_output_must_be_a_pth(trained, nothing_left):
    with pytest.raises(
        UserError, match='must end in .pth or .safetensors, got .*pt$'
    ):
        run(trained, nothing_left / 'out.pt')


@pytest.mark.parametrize('name', ['out.pth', 'out.py'])
def test_existing_output(trained, tmp_path, name):
    (tmp_path / name).write_text('old')
    with pytest.raises(UserError, match=f'output exists: .*{name}; .*--forc'):
        run(trained, tmp_path / 'out.pth')
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == 'old'


@pytest.mark.parametrize('overwrite', [True, False])
def test_output_that_is_an_input(trained, overwrite):
    folder = trained['classifier']
    before = sorted(os.listdir(folder))
    for name in ('trained.pth', 'config.pth'):
        with pytest.raises(UserError, match='output .* is also an input'):
            run(trained, folder / name, overwrite=overwrite)
    assert sorted(os.listdir(folder)) == before


def not_an_image(tmp_path):
    path = tmp_path / 'a.jpg'
    path.write_text('not an image')
    return path


@pytest.mark.parametrize(
    'make, message',
    [
        (not_an_image, 'not an image: .*a.jpg'),
        (lambda p: p / 'none.jpg', 'cannot read image .*none.jpg'),
        (lambda p: p, 'image'),
    ],
    ids=['text', 'missing', 'folder'],
)
def test_bad_images(trained, tmp_path, nothing_left, make, message):
    images = [picture(tmp_path / 'good.png'), str(make(tmp_path))]
    with pytest.raises(UserError, match=message):
        run(trained, nothing_left / 'out.pth', images=images)


def test_networks_that_differ_leave_nothing(trained, nothing_left):
    with pytest.raises(UserError, match='differs by .*tolerance 0.*nothing'):
        run(trained, nothing_left / 'out.pth', tolerance=0.0)


@pytest.mark.parametrize('task', CONFIGS)
def test_wrong_merge_leaves_nothing(trained, nothing_left, monkeypatch, task):
    """Each block's kernel flipped: a mistake of ours, found."""
    stock_state = merge.stock_state

    def wrong(*args, **kwargs):
        state = stock_state(*args, **kwargs)
        name = [n for n in state if n.endswith('conv.weight')] or [
            n for n in state if n.endswith('conv2.weight')
        ]
        state[name[-1]] = -state[name[-1]]
        return state

    monkeypatch.setattr(merge, 'stock_state', wrong)
    with pytest.raises(UserError, match='differs by .*nothing written'):
        run(trained, nothing_left / 'out.pth', task)


@pytest.fixture
def harmed(trained, nothing_left, monkeypatch):
    """Deploy by a merge that goes wrong; nothing may be written."""

    def harmed(harm, match, task='classifier', **options):
        stock_state = merge.stock_state

        def wrong(model, stock, **kwargs):
            state = stock_state(model, stock, **kwargs)
            harm(state)
            return state

        monkeypatch.setattr(merge, 'stock_state', wrong)
        with pytest.raises(UserError, match=f'{match}.*nothing written'):
            run(trained, nothing_left / 'out.pth', task, **options)

    return harmed


def noisy(scale):
    def harm(state):
        kernel = state['backbone.layer1.1.conv2.weight']
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(kernel.shape, generator=generator)
        kernel.mul_(1 + scale * noise)

    return harm


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('precision', [torch.float32, torch.bfloat16])
def test_the_proof_is_as_sharp_in_every_precision(
    trained, tmp_path, harmed, precision, fuse
):
    """One entry of half precision does not loosen what the others must be."""
    state = torch.load(trained['classifier'] / 'trained.pth')['state_dict']
    state['head.fc.bias'] = state['head.fc.bias'].to(precision)
    torch.save(state, tmp_path / 'in.pth')
    checkpoint = str(tmp_path / 'in.pth')
    harmed(noisy(1e-4), 'differs by', checkpoint=checkpoint, fuse=fuse)


def flip_stem(state):
    state['backbone.conv1.weight'].neg_()


def drop_count(state):
    state['backbone.bn1.num_batches_tracked'] += 1


def flip_small_channel(state):
    state['backbone.layer1.0.conv1.weight'][0] *= -1


@pytest.mark.parametrize(
    'harm, fuse, match',
    [
        (flip_stem, False, 'no copy .*: backbone.conv1.weight'),
        (flip_stem, True, r'differs by .*\(in backbone.conv1\)'),
        (drop_count, False, 'no copy .*: backbone.bn1.num_batches_tracked'),
        (flip_small_channel, False, r'differs .*\(in .*layer1.0.conv1\)'),
        (flip_small_channel, True, r'differs .*\(in .*layer1.0.conv1\)'),
    ],
)
def test_what_no_image_shows_is_found(
    trained, tmp_path, harmed, harm, fuse, match
):
    """Nothing comes through the stem, and a channel is next to nothing."""
    state = torch.load(trained['classifier'] / 'trained.pth')['state_dict']
    state['backbone.bn1.bias'].fill_(-1e3)
    norm = 'backbone.layer1.0.conv1.branches'
    for name, value in state.items():
        last = name.endswith(('norm.weight', 'norm.bias', 'out_norm.bias'))
        if name.startswith(norm) and (last or name.endswith('_norm.weight')):
            value[0] *= 1e-6
    torch.save(state, tmp_path / 'in.pth')
    harmed(harm, match, checkpoint=str(tmp_path / 'in.pth'), fuse=fuse)


@pytest.mark.parametrize(
    'which', ['all', 'backbone.bn1', 'decode_head.bottleneck.bn']
)
def test_a_wrong_eps_is_found(trained, nothing_left, monkeypatch, which):
    stock_config = parts.stock_config

    def wrong(cfg):
        cfg = stock_config(cfg)
        cfg.model.backbone.norm_cfg = dict(type='BN', eps=2e-5)
        return cfg

    def wrong_model(*described):
        model = network_of(*described)
        model.get_submodule(which).eps = 2e-5
        return model

    task = 'segmentor' if which.startswith('decode_head') else 'classifier'
    if which == 'all':
        monkeypatch.setattr(parts, 'stock_config', wrong)
    else:
        monkeypatch.setattr(outputs, 'network_of', wrong_model)
    # The first norm outside of blocks, where all have another eps.
    named = 'backbone.bn1' if which == 'all' else which
    with pytest.raises(UserError, match=f'differs by|no copy .*: {named}'):
        run(trained, nothing_left / 'out.pth', task)


@pytest.mark.parametrize(
    'other',
    [
        nn.AvgPool2d(3, 2, 1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.Sequential(),
    ],
)
def test_a_layer_without_parameters_is_compared(
    trained, tmp_path, nothing_left, monkeypatch, other
):
    """Behind a ReLU that is zero, any pooling gives zero."""
    state = torch.load(trained['classifier'] / 'trained.pth')['state_dict']
    state['backbone.bn1.bias'].fill_(-1e3)
    torch.save(state, tmp_path / 'in.pth')

    def wrong(*described):
        model = network_of(*described)
        model.backbone.maxpool = other
        return model

    monkeypatch.setattr(outputs, 'network_of', wrong)
    # Without any, other sizes give other shapes.
    with pytest.raises(UserError, match='no copy .*: backbone.maxpool|differ'):
        run(
            trained,
            nothing_left / 'out.pth',
            checkpoint=str(tmp_path / 'in.pth'),
        )


def test_what_is_written_is_what_was_proven(
    trained, nothing_left, monkeypatch
):
    """A disk that keeps one bit wrong."""
    write = outputs.write_checkpoint

    def wrong(path, state, meta):
        state = {name: value.clone() for name, value in state.items()}
        first = next(iter(state.values()))
        first.view(torch.int32).reshape(-1)[0] ^= 1
        write(path, state, meta)

    monkeypatch.setattr(outputs, 'write_checkpoint', wrong)
    with pytest.raises(UserError, match='not what was proven, rounded: backb'):
        run(trained, nothing_left / 'out.pth')


def test_the_source_is_read_twice(trained, nothing_left, monkeypatch):
    """A reader that gives other numbers each time is found."""
    read, number = outputs.read_checkpoint, iter(range(9))

    def unsure(path, *args):
        loaded = read(path, *args)
        loaded['state_dict']['backbone.conv1.weight'][0] += next(number)
        return loaded

    monkeypatch.setattr(outputs, 'read_checkpoint', unsure)
    with pytest.raises(UserError, match='no copy|differs|read in two ways'):
        run(trained, nothing_left / 'out.pth')


def test_a_trained_network_that_overflows_is_named(
    trained, tmp_path, nothing_left
):
    state = torch.load(trained['classifier'] / 'trained.pth')['state_dict']
    # Each finite, but not their sum.
    state['head.fc.weight'] = state['head.fc.weight'].double().fill_(1e308)
    state['head.fc.bias'] = state['head.fc.bias'].double().fill_(1e308)
    torch.save(state, tmp_path / 'in.pth')
    with pytest.raises(
        UserError, match='that was trained gives values that are not finite'
    ):
        run(
            trained,
            nothing_left / 'out.pth',
            checkpoint=str(tmp_path / 'in.pth'),
        )


def test_a_layer_that_computes_in_single_precision_only(
    trained, tmp_path, monkeypatch
):
    from mmpretrain.models import LinearClsHead

    forward = LinearClsHead.pre_logits

    def single(self, feats):
        x = forward(self, feats)
        weight = torch.eye(x.shape[1])
        return x @ weight  # of float32: nothing else goes with it

    monkeypatch.setattr(LinearClsHead, 'pre_logits', single)
    result = run(trained, tmp_path / 'out.pth')
    assert 1e-9 < result.difference.largest < 1e-5


def test_an_interruption_leaves_nothing(trained, nothing_left, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(deploying, 'prove_equal', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(trained, nothing_left / 'new' / 'out.pth')


@pytest.mark.parametrize(
    'other, parts',
    [
        ('detector', 'neck, rpn_head, roi_head'),
        ('segmentor', 'decode_head, auxiliary_head'),
    ],
)
def test_file_of_another_task(trained, nothing_left, other, parts):
    message = f'other parts: {parts} in the file, head in the network; missing'
    with pytest.raises(UserError, match=f'does not fit .* {message}'):
        run(
            trained,
            nothing_left / 'out.pth',
            checkpoint=str(trained[other] / 'trained.pth'),
        )


def test_load_deployed_refuses_what_does_not_fit(trained, tmp_path):
    one = run(trained, tmp_path / 'one.pth')
    other = run(trained, tmp_path / 'other.pth', 'segmentor')
    with pytest.raises(UserError, match='one.pth does not fit the network'):
        load_deployed(other.config, one.checkpoint)


# The tool of mmpretrain, which calls switch_to_deploy()


def test_mmpretrains_tool_and_ours_agree(trained, tmp_path, monkeypatch):
    path = Path(mmpretrain.__file__).parent / '.mim' / 'tools'
    path = path / 'model_converters' / 'reparameterize_model.py'
    if not path.is_file():
        pytest.skip('mmpretrain is installed without its tools')
    folder, out = trained['classifier'], tmp_path / 'theirs.pth'
    arguments = [folder / 'config.py', folder / 'trained.pth', out]
    monkeypatch.setattr(sys, 'argv', ['tool', *map(str, arguments)])
    runpy.run_path(str(path), run_name='__main__')

    cfg = Config.fromfile(folder / 'config.py')
    cfg.model.backbone.deploy = True
    theirs = build_model(cfg)
    theirs.load_state_dict(torch.load(out)['state_dict'])
    ours = run(trained, tmp_path / 'ours.pth')
    ours = load_deployed(ours.config, ours.checkpoint)
    x = image(2, 3, 40, 56, dtype=torch.float32)
    assert distance(theirs(x), ours(x)) < 1e-5
    with pytest.raises(UserError, match='theirs.pth is merged already'):
        run(trained, tmp_path / 'a.pth', checkpoint=str(out))


# As a command


def command(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )


def test_command(trained, tmp_path):
    folder = trained['classifier']
    out = tmp_path / 'out.pth'
    done = command(
        folder / 'config.py',
        folder / 'trained.pth',
        out,
        '--image-size',
        *SIZE,
        '--images',
        picture(tmp_path / 'a.png'),
    )
    assert done.returncode == 0, done.stderr
    assert 'merged 8 blocks: ' in done.stdout
    assert 'largest difference: ' in done.stdout
    assert str(out) in done.stdout and 'tolerance 1e-09' in done.stdout
    assert 'for comparison: float32 instead of float64 moves' in done.stdout
    assert 'not compared' not in done.stdout
    names = ['a.png', 'out.pth', 'out.py']
    assert sorted(os.listdir(tmp_path)) == names


def in_this_process(monkeypatch, capsys, *arguments):
    """As `command`, without the seconds that the imports take."""
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name='__main__')
    return subprocess.CompletedProcess(
        arguments, stop.value.code, *capsys.readouterr()
    )


@pytest.mark.parametrize('case', ['no checkpoint', 'no config', 'differs'])
def test_command_with_a_mistake(
    trained, nothing_left, case, monkeypatch, capsys
):
    folder = trained['classifier']
    config, checkpoint = folder / 'config.py', folder / 'trained.pth'
    out = nothing_left / 'out.pth'
    arguments, message = {
        'no checkpoint': (
            (config, folder / 'none.pth', out),
            'no such checkpoint: ',
        ),
        'no config': ((folder / 'none.py', checkpoint, out), 'none.py'),
        'differs': (
            (config, checkpoint, out, '--tolerance', 0, '--image-size', *SIZE),
            'the merged network differs by ',
        ),
    }[case]
    if case == 'no config':  # the one that imports little
        done = command(*arguments)
    else:
        done = in_this_process(monkeypatch, capsys, *arguments)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith('reparam.py: ')]
    assert len(errors) == 1 and message in errors[0]
    assert lines[-1] == errors[0]
    assert 'Traceback' not in done.stderr
    assert 'merged' not in done.stdout


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.6.0'),
    reason='this torch is not asked',
)
def test_a_mistake_of_the_reader_is_found(trained, tmp_path, monkeypatch):
    # In both reads alike, so that the networks that are compared are equal.
    def wrong(path):
        content = read_torch(path)
        if LIVE in content['state_dict']:  # not in what is written
            content['state_dict'][LIVE].mul_(2)
        return content

    monkeypatch.setattr(checkpoints, 'read_torch', wrong)
    with pytest.raises(UserError, match=f'two ways, .* differ in {LIVE}'):
        run(trained, tmp_path / 'a.pth')
    assert os.listdir(tmp_path) == []
