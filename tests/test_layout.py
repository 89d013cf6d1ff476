"""Imports point one way, the package is light, its examples run."""

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmdbb

ROOT = Path(mmdbb.__file__).parent
#: The lower storey, which needs torch only. Each part may import from those
#: above it, and from itself. What is new belongs somewhere here.
LOWER = (
    ('version', 'errors', 'registry'),
    ('ports', 'modules'),
    ('recompute',),
    ('geometry',),
    ('transforms',),
    ('kernels',),
    ('branches',),
    ('blocks',),
    ('reparam', 'conv_norms', 'tracing', 'files'),
    ('stock_weights',),
    ('plain', 'untouched'),
    ('official',),
    ('insert', 'compare'),
)
#: The upper storey: folders and files of `mmdbb.mm`, on top of the lower.
UPPER = (
    ('mm.hosts',),
    ('mm',),
    ('mm.host_internals', 'mm.host_loading'),
    ('mm.config_files', 'mm.config_types'),
    ('mm.backbones', 'mm.stock'),
    ('mm.export',),
    ('mm.deploy',),
    ('mm.official',),
    ('mm.starts',),
    ('mm.engine',),
    ('mm.evaluation',),
    ('mm.quantization',),
    ('mm.pruning',),
    ('mm.registration',),
    # The public faces.
    ('backbones', 'deploy', 'export', 'quantize', 'prune'),
)
LAYERS = LOWER + UPPER
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(path for path in ROOT.rglob('*.py') if '.mim' not in path.parts)
HOST_PACKAGES = ('mmpretrain', 'mmdet', 'mmseg')


def module_of(path):
    parts = ('mmdbb', *path.relative_to(ROOT).with_suffix('').parts)
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports_of(path):
    """Full names of all modules that a file imports, wherever it does."""
    package = module_of(path).split('.')
    if path.name != '__init__.py':
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level]
            name = [*base, node.module] if node.level else [node.module]
            name = '.'.join(part for part in name if part)
            if name == 'mmdbb':
                yield from (f'mmdbb.{alias.name}' for alias in node.names)
            yield name


def part_of(module):
    names = module.split('.')[1:]
    return '.'.join(names[:2] if names[0] == 'mm' else names[:1])


INNER = [path for path in FILES if path != ROOT / '__init__.py']


@pytest.mark.parametrize('path', INNER, ids=module_of)
def test_imports_point_one_way(path):
    part = part_of(module_of(path))
    assert part in RANK, f'say in LAYERS where mmdbb.{part} belongs'
    for name in imports_of(path):
        if not name.startswith('mmdbb.'):
            # From the package itself nothing is imported inside of it.
            assert name != 'mmdbb' or path.name == '__init__.py', name
            continue
        other = part_of(name)
        if other in RANK and other != part:
            assert RANK[other] < RANK[part], f'{part} imports {other}'


def test_the_test_of_directions_bites(tmp_path):
    found = list(imports_of(ROOT / 'blocks' / 'dbb.py'))
    assert 'mmdbb.blocks.branch_sum' in found
    found = list(imports_of(ROOT / 'branches' / '__init__.py'))
    assert 'mmdbb.branches.kxk' in found


@pytest.mark.parametrize(
    'path',
    [p for p in INNER if RANK.get(part_of(module_of(p)), 99) < 5],
    ids=module_of,
)
def test_the_core_names_no_host_package(path):
    """What a user of plain PyTorch gets needs mmengine and mmcv only."""
    assert not set(imports_of(path)) & set(HOST_PACKAGES)


def test_tools_only_parse_arguments():
    for path in (ROOT.parent / 'tools').glob('*.py'):
        assert not [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef)
        ], f'{path.name} has work in it that belongs into the package'


def test_import_is_light():
    code = (
        'import sys, mmdbb\n'
        f'found = [n for n in {HOST_PACKAGES!r} if n in sys.modules]\n'
        'assert not found, found\n'
        "assert 'mmdbb.backbones' not in sys.modules\n"
        "assert 'workshop.demo' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_all_is_importable():
    for name in mmdbb.__all__:
        assert hasattr(mmdbb, name)


MODULES = [
    info.name
    for info in pkgutil.walk_packages([str(ROOT)], 'mmdbb.')
    if not info.name.startswith('workshop.demo') and '.mim' not in info.name
]


@pytest.mark.parametrize('name', ['mmdbb', *MODULES])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert not result.failed


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    names = {
        test.name
        for module in modules
        for test in finder.find(module)
        if test.examples
    }
    for public in ('DBB', 'DiverseBranchBlock', 'reparameterize', 'ConvSpec'):
        assert [n for n in names if n.endswith(f'.{public}')], public
