"""The public faces, and that the docs and the tools use nothing else."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import mmdbb

ROOT = Path(__file__).resolve().parents[1]
#: One for each thing that users do; docs/design.md lists them.
FACES = (
    'backbones',
    'deploy',
    'export',
    'insert',
    'prune',
    'quantize',
    'reparam',
    'report',
    'repopt',
    'shares',
    'yolo',
)
#: What else users import, for parts of their own.
BASES = (
    'blocks',
    'blocks.base',
    'blocks.branch_sum',
    'blocks.build',
    'branches',
    'branches.base',
    'branches.norm',
    'errors',
    'dimensions',
    'geometry',
    'kernels',
    'mm.hosts',
    'registry',
    'transforms',
)
PUBLIC = {f'mmdbb.{name}' for name in (*FACES, *BASES)}
PAGES = sorted([ROOT / 'README.md', *ROOT.glob('docs/*.md')])


def imports_of(source):
    """Modules, and names in them, that Python source takes from mmdbb."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split('.')[0] == 'mmdbb':
                    yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            if (node.module or '').split('.')[0] == 'mmdbb':
                yield node.module, tuple(a.name for a in node.names)


@pytest.mark.parametrize('name', FACES)
def test_face_has_all_that_it_names(name):
    face = importlib.import_module(f'mmdbb.{name}')
    assert face.__doc__
    for public in face.__all__:
        assert getattr(face, public).__doc__, public


@pytest.mark.parametrize('name', FACES)
def test_face_is_in_the_docs(name):
    assert f'`mmdbb.{name}`' in (ROOT / 'docs/design.md').read_text()


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_docs_import_what_is_public(path):
    found = re.findall(r'```python\n(.*?)```', path.read_text(), re.S)
    for source in found:
        for module, names in imports_of(source):
            if module == 'mmdbb':
                assert set(names) <= {*mmdbb.__all__}, names
                continue
            assert module in PUBLIC, f'{module} is not public'
            public = getattr(importlib.import_module(module), '__all__', names)
            assert set(names) <= {*public}, names


@pytest.mark.parametrize('name', FACES)
def test_tools_use_the_faces(name):
    """A name that a face has is taken from a face."""
    public = importlib.import_module(f'mmdbb.{name}').__all__
    for path in ROOT.glob('tools/*.py'):
        for module, names in imports_of(path.read_text()):
            if module not in PUBLIC:
                assert not set(names) & set(public), path.name


def test_registries_register_as_mmengine_does():
    from mmengine.registry import Registry as Theirs

    from mmdbb.registry import Registry as Ours

    class One:
        pass

    class Two:
        pass

    for registry in (Ours('part'), Theirs('part')):
        registry.register_module('a', False, One)
        registry.register_module(name=['b', 'c'])(Two)
        registry.register_module()(Two)
        registry.register_module('a', True, Two)
        assert registry.get('a') is registry.get('c') is Two
        assert registry.get('Two') is Two and registry.get('d') is None
        assert 'b' in registry and len(registry) == 4
        with pytest.raises(KeyError, match='already registered'):
            registry.register_module('a', module=One)
        with pytest.raises(TypeError, match='name must be'):
            registry.register_module(One)  # a decorator without parentheses
        with pytest.raises(TypeError, match='module must be'):
            registry.register_module('e', module='One')
        assert 'e' not in registry


def test_a_block_can_take_the_name_of_another(monkeypatch):
    from mmengine.registry import MODELS

    from mmdbb.blocks.branch_sum import BranchSumConv2d
    from mmdbb.blocks.build import register_conv_layer
    from mmdbb.registry import BLOCKS

    monkeypatch.setattr(BLOCKS, 'module_dict', dict(BLOCKS.module_dict))
    monkeypatch.setattr(MODELS, '_module_dict', dict(MODELS.module_dict))

    class First(BranchSumConv2d):
        preset = ('kxk',)

    class Second(BranchSumConv2d):
        preset = ('kxk', '1x1')

    register_conv_layer('Taken')(First)
    with pytest.raises(KeyError, match='force=True'):
        register_conv_layer('Taken')(Second)
    assert BLOCKS.get('Taken') is First
    register_conv_layer('Taken', force=True)(Second)
    built = MODELS.build(
        dict(type='Taken', in_channels=2, out_channels=2, kernel_size=3)
    )
    assert type(built) is BLOCKS.get('Taken') is Second


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (('config.py', 'a.pth'), 'cfg must be a Config, .*got a str'),
        ((None, Path('a.pth')), "must be a path in a string, got .*a.pth'"),
    ],
)
def test_sources_of_wrong_types(source, message):
    from mmdbb.deploy import Source

    with pytest.raises(TypeError, match=message):
        Source(*source)


def test_what_is_no_source(tmp_path):
    from mmdbb.deploy import deploy_checkpoint

    with pytest.raises(TypeError, match=r'must be a Source.*got a str'):
        deploy_checkpoint('a.pth', tmp_path / 'b.pth')


@pytest.mark.parametrize(
    ('work', 'suffix'),
    [
        ('deploy_checkpoint', 'pth'),
        ('export_checkpoint', 'onnx'),
        ('insert_bn_checkpoint', 'pth'),
        ('prune_checkpoint', 'pth'),
        ('quantize_checkpoint', 'onnx'),
    ],
)
def test_sources_without_the_config_that_is_needed(work, suffix, tmp_path):
    from mmdbb import deploy, export, prune, quantize
    from mmdbb.errors import UserError

    faces = (deploy, export, prune, quantize)
    run = next(getattr(f, work) for f in faces if hasattr(f, work))
    checkpoint, out = tmp_path / 'a.pth', tmp_path / f'b.{suffix}'
    checkpoint.write_bytes(b'x')
    source = deploy.Source(None, str(checkpoint))
    arguments = ['onnx'] if work == 'export_checkpoint' else []
    with pytest.raises(UserError, match='a.pth needs the config'):
        run(source, out, *arguments)  # a Path serves as well as a string
    assert not out.exists()


def test_plain_weights_by_path_and_of_wrong_types(tmp_path):
    import torch
    from torch import nn

    plain, path = nn.Sequential(nn.Conv2d(2, 3, 3)), tmp_path / 'plain.pth'
    torch.save(plain.state_dict(), path)
    model = nn.Sequential(mmdbb.DBB(2, 3, 3)).eval()
    mmdbb.load_plain_weights_(model, path)
    x = torch.rand(1, 2, 6, 5)
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    for wrong in (None, 5, plain):
        with pytest.raises(TypeError, match='weights must be a path'):
            mmdbb.load_plain_weights_(model, wrong)
    with pytest.raises(TypeError, match=r"unknown keys \['foo'\]; allowed"):
        mmdbb.insert_blocks_(plain, dict(type='DBB', foo=1))
