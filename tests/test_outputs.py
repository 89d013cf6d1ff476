"""All workflows refuse, note and read again in the same way."""

import hashlib
import json
import lzma
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
from helpers import image, run_tool
from mmengine.config import Config
from mmengine.registry import HOOKS

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.mm import outputs
from mmdbb.mm.deploy.checkpoint import deploy_checkpoint
from mmdbb.mm.deploy.merge import MergeOptions
from mmdbb.mm.engine import reparam_hook
from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.export.checkpoint import export_checkpoint
from mmdbb.mm.official.convert import convert_official
from mmdbb.mm.outputs import Proof, Source
from mmdbb.mm.pruning.pipeline import PruneOptions, prune_checkpoint
from mmdbb.mm.quantization.insert_bn import insert_bn_checkpoint
from mmdbb.mm.quantization.post_training import QuantizeOptions
from mmdbb.mm.quantization.ptq import quantize_checkpoint
from mmdbb.mm.structure import Structure, written_structure
from mmdbb.version import __version__

pytestmark = pytest.mark.usefixtures('quiet')
DATA = Path(__file__).parent / 'data' / 'official'
FEW = Calibration(8)
SMALL = Proof(image_size=(32, 32))


def deploy(source, out, **options):
    return deploy_checkpoint(source, out, proof=SMALL, **options)


def deploy_fused(source, out, **options):
    return deploy(source, out, options=MergeOptions(fuse=True), **options)


def deploy_a_part(source, out, **options):
    some = MergeOptions(only=['*layer1*'])
    return deploy(source, out, options=some, **options)


def export_torchscript(source, out, **options):
    return export_checkpoint(
        source, out, 'torchscript', proof=SMALL, **options
    )


def export_onnx(source, out, **options):
    return export_checkpoint(source, out, 'onnx', proof=SMALL, **options)


def convert(source, out, **options):
    return convert_official(source.checkpoint, out, **options)


def insert_norms(source, out, **options):
    return insert_bn_checkpoint(source, out, FEW, **options)


def prune(source, out, **options):
    few = PruneOptions(ratio=0.4, calibration=FEW)
    return prune_checkpoint(source, out, few, **options)


def prune_and_export(source, out, **options):
    weights = str(Path(out).with_suffix('.pth'))
    return prune(source, weights, onnx=out, **options)


def quantize(source, out, **options):
    few = QuantizeOptions(calibration=FEW)
    return quantize_checkpoint(source, out, few, evaluated=False, **options)


class Workflow(NamedTuple):
    run: Callable
    suffix: str
    structure: str
    needs: str = 'torch'


WORKFLOWS = [
    Workflow(deploy, '.pth', 'stock'),
    Workflow(deploy_fused, '.pth', 'fused'),
    Workflow(deploy_a_part, '.pth', 'partial'),
    Workflow(export_torchscript, '.pt', 'fused'),
    Workflow(export_onnx, '.onnx', 'fused', 'onnxruntime'),
    Workflow(convert, '.pth', 'train'),
    Workflow(insert_norms, '.pth', 'train'),
    Workflow(prune, '.pth', 'pruned', 'torch_pruning'),
    Workflow(prune_and_export, '.onnx', 'pruned', 'torch_pruning'),
    Workflow(quantize, '.onnx', 'fused', 'onnxruntime'),
]
OF_WEIGHTS = [w for w in WORKFLOWS if w.suffix == '.pth']


def for_workflows(workflows):
    return pytest.mark.parametrize(
        'workflow', workflows, ids=lambda w: w.run.__name__
    )


@pytest.fixture(scope='module')
def source_of(trained, tmp_path_factory):
    """Workflow -> what it reads, with averaged weights; not to be changed."""
    cfg, checkpoint = trained('classification')
    folder = tmp_path_factory.mktemp('sources')
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    averaged = folder / 'averaged.pth'
    torch.save(
        dict(model={k: v.clone() for k, v in state.items()}, model_ema=state),
        averaged,
    )
    name = 'mobilenet_dbb_train.pth.tar'
    official = folder / name
    official.write_bytes(lzma.open(DATA / f'{name}.xz').read())

    def source_of(workflow):
        if workflow.needs != 'torch':
            pytest.importorskip(workflow.needs)
        if workflow.suffix == '.onnx':
            pytest.importorskip('onnxruntime')
        if workflow.run is convert:
            return Source(None, str(official))
        return Source(cfg, str(averaged))

    return source_of


def noted(path):
    """What a file says of itself."""
    if path.endswith('.pth'):
        # Plain text and numbers only, or torch would refuse.
        meta = torch.load(path, weights_only=True)['meta']
        assert meta['cfg'] == Config.fromfile(path[:-4] + '.py').pretty_text
        return meta['mmdbb']
    if path.endswith('.pt'):
        extra = {'mmdbb.json': ''}
        torch.jit.load(path, _extra_files=extra)
        return json.loads(extra['mmdbb.json'])
    import onnx

    props = {p.key: p.value for p in onnx.load(path).metadata_props}
    return json.loads(props['mmdbb'])


@for_workflows(WORKFLOWS)
def test_every_file_notes_where_it_comes_from(workflow, source_of, tmp_path):
    source = source_of(workflow)
    out = str(tmp_path / f'out{workflow.suffix}')
    workflow.run(source, out)
    notes = noted(out)
    content = Path(source.checkpoint).read_bytes()
    assert notes['source_sha256'] == hashlib.sha256(content).hexdigest()
    assert notes['version'] == __version__
    assert notes['structure'] == workflow.structure
    official = 'the only ones'  # a bare state dict
    averaged = 'the averaged ones, model_ema'
    expected = official if workflow.run is convert else averaged
    assert notes['weights'] == expected


@for_workflows([w for w in WORKFLOWS if w.run is not convert])
def test_every_workflow_takes_the_weights_asked_for(
    workflow, source_of, tmp_path
):
    source = source_of(workflow)
    source = Source(source.cfg, source.checkpoint, ema=False)
    out = str(tmp_path / f'out{workflow.suffix}')
    workflow.run(source, out)
    assert noted(out)['weights'] == 'the trained ones, model'


@for_workflows(WORKFLOWS)
def test_no_workflow_writes_over_what_it_reads(workflow, source_of, tmp_path):
    given = source_of(workflow)
    checkpoint = tmp_path / f'trained{workflow.suffix}'
    checkpoint.write_bytes(Path(given.checkpoint).read_bytes())
    targets = [checkpoint]
    cfg = None
    if given.cfg is not None:
        given.cfg.dump(tmp_path / 'base.py')
        (tmp_path / 'config.py').write_text("_base_ = './base.py'\n")
        cfg = Config.fromfile(tmp_path / 'config.py')
        for name in ('config', 'base'):
            if workflow.suffix == '.pth':
                # The config is written beside the weights.
                targets.append(tmp_path / f'{name}.pth')
            else:
                targets.append(tmp_path / f'{name}{workflow.suffix}')
                targets[-1].symlink_to(f'{name}.py')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for target in targets:
        with pytest.raises(UserError, match='is also an input'):
            workflow.run(
                Source(cfg, str(checkpoint)), str(target), overwrite=True
            )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@for_workflows(WORKFLOWS)
def test_every_workflow_asks_before_it_replaces(workflow, source_of, tmp_path):
    out = tmp_path / f'out{workflow.suffix}'
    out.write_text('precious')
    with pytest.raises(UserError, match='output exists: .*--force'):
        workflow.run(source_of(workflow), str(out))
    assert out.read_text() == 'precious'
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@for_workflows(OF_WEIGHTS)
def test_every_checkpoint_is_read_again(
    workflow, source_of, tmp_path, monkeypatch
):
    """A disk that keeps one bit wrong."""
    write = outputs.write_checkpoint

    def wrong(path, state, meta):
        state = {name: value.clone() for name, value in state.items()}
        next(iter(state.values())).view(torch.int32).view(-1)[0] ^= 1
        write(path, state, meta)

    monkeypatch.setattr(outputs, 'write_checkpoint', wrong)
    with pytest.raises(UserError, match='not what was proven, rounded'):
        workflow.run(source_of(workflow), str(tmp_path / 'out.pth'))
    assert not list(tmp_path.iterdir())


@for_workflows(OF_WEIGHTS)
def test_every_checkpoint_fits_the_config_beside_it(
    workflow, source_of, tmp_path, monkeypatch
):
    """A config that loses a line on its way to the disk."""
    network_of, built = outputs.network_of, []

    def wrong(config, checkpoint):
        network = network_of(config, checkpoint)
        built.append(network)
        network.backbone.conv1.register_buffer('more', torch.ones(1))
        return network

    monkeypatch.setattr(outputs, 'network_of', wrong)
    with pytest.raises(UserError, match='missing: backbone.conv1.more'):
        workflow.run(source_of(workflow), str(tmp_path / 'out.pth'))
    assert built and not list(tmp_path.iterdir())


@for_workflows([w for w in WORKFLOWS if w.run is not quantize])
def test_an_advice_can_be_followed(workflow, source_of, tmp_path):
    """Only a tool that has --unsafe-load is told of it."""
    source = source_of(workflow)
    path = tmp_path / 'more.pth'
    content = torch.load(source.checkpoint, weights_only=True)
    torch.save(dict(content, more=Path('a')), path)
    out = tmp_path / 'out' / f'out{workflow.suffix}'
    with pytest.raises(UserError, match='save it again without that') as said:
        workflow.run(Source(source.cfg, str(path)), str(out))
    assert '--unsafe-load' not in str(said.value)
    assert not out.parent.exists()


def test_the_tools_name_their_own_option(source_of, tmp_path, capsys):
    source = source_of(OF_WEIGHTS[0])
    path = tmp_path / 'more.pth'
    content = torch.load(source.checkpoint, weights_only=True)
    torch.save(dict(content, more=Path('a')), path)
    names = (source.cfg.filename, path, tmp_path / 'out.pth')
    for tool, arguments in dict(
        reparam=names, convert_official=names[1:]
    ).items():
        assert run_tool(tool, *arguments) == 2
        assert '--unsafe-load reads it' in capsys.readouterr().err
    if 'torch_pruning' in sys.modules:
        assert run_tool('prune', *names) == 2
        assert '--unsafe-load' not in capsys.readouterr().err


# The hook


def built_hook(**options):
    return HOOKS.build(dict(type='ReparamHook', **options))


def test_options_of_the_hook(monkeypatch):
    calls = []

    def deploy(*arguments, **options):
        calls.append(arguments)
        raise UserError('enough')

    class Runner:
        cfg = Config()

        class logger:
            exception = staticmethod(lambda text: None)

    monkeypatch.setattr(reparam_hook, 'deploy_checkpoint', deploy)
    hook = built_hook(
        image_size=(64, 48),
        tolerance=1e-3,
        images=['a.png'],
        seed=3,
        fuse=True,
        only=['a*'],
        skip=['b'],
        dtype=torch.float32,
        ema=False,
    )
    hook._deploy(Runner, 'best.pth', None)
    ((source, out, merging, proof),) = calls
    assert source.checkpoint == 'best.pth' and source.ema is False
    assert out == 'best_deploy.pth'
    assert merging == MergeOptions(True, ['a*'], ['b'], torch.float32)
    assert proof == Proof(['a.png'], (64, 48), 1e-3, 3)
    # Nobody can pass --unsafe-load to a hook, so no message may advise it.
    assert source.unsafe is None
    built_hook(unsafe=True)._deploy(Runner, 'best.pth', None)
    assert calls[-1][0].unsafe is True


def test_an_option_that_the_hook_does_not_have():
    with pytest.raises(TypeError, match='has no size, colour; it has suffix,'):
        built_hook(size=(64, 64), colour=1)


# What is noted


def test_structures_stand_in_files_as_before():
    values = {s.name: s.value for s in Structure}
    assert values == dict(
        TRAIN='train',
        STOCK='stock',
        FUSED='fused',
        PARTIAL='partial',
        PRUNED='pruned',
    )
    for structure in Structure:
        own = dict(mmdbb=dict(structure=structure.value))
        assert written_structure(dict(meta=own)) is structure
    for other in ('later', 3, None, ['stock'], {}):
        own = dict(mmdbb=dict(structure=other))
        assert written_structure(dict(meta=own)) is None
    assert written_structure(dict(meta=dict(mmdbb='stock'))) is None


def test_notes_are_plain_text():
    source = Source(None, __file__)
    assert type(source.notes(Structure.STOCK, '')['structure']) is str


def test_what_the_training_noted_stays(source_of, tmp_path):
    source = source_of(OF_WEIGHTS[0])
    content = torch.load(source.checkpoint, weights_only=True)
    classes = dict(classes=['a', 'b'])
    old = dict(version='0', structure='train', colour='red')
    content['meta'] = dict(dataset_meta=classes, cfg='old', mmdbb=old)
    torch.save(content, tmp_path / 'in.pth')
    given = Source(source.cfg, str(tmp_path / 'in.pth'))
    for workflow in OF_WEIGHTS:
        if workflow.run is convert:
            continue
        source_of(workflow)
        out = str(tmp_path / f'{workflow.run.__name__}.pth')
        workflow.run(given, out)
        meta = read_checkpoint(out)['meta']
        assert meta['dataset_meta'] == classes and meta['cfg'] != 'old'
        assert 'colour' not in meta['mmdbb']


# Images to compare on


def test_images_of_a_proof():
    class Model(torch.nn.Module):
        pass

    batch = image(2, 3, 5, 6)
    proof = Proof(images=[batch], image_size=(5, 6))
    first, second = proof.batches(Model())
    assert second is batch and first.shape == (2, 3, 5, 6)
    assert torch.equal(proof.batches(Model())[0], first)
    other = proof._replace(seed=1)
    assert not torch.equal(other.batches(Model())[0], first)
    assert not proof.paths
    assert Proof(images=['a.png', batch]).paths == ['a.png']
