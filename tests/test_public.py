"""The public faces, and that the docs and the tools use nothing else."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import mmdbb

ROOT = Path(__file__).resolve().parents[1]
#: One for each thing that users do; docs/design.md lists them.
FACES = ('backbones', 'deploy', 'export', 'insert', 'prune', 'quantize')
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
    'geometry',
    'kernels',
    'mm.hosts',
    'registry',
    'reparam',
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
