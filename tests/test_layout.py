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
    ('mm.host_internals',),
    ('mm.host_loading', 'mm.config_files'),
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


# The hosts' private parts

#: torch's, Python's, and those of every named tuple.
NOT_OF_HOSTS = {
    '_modules',
    '_parameters',
    '_buffers',
    '_conv_forward',
    '_forward_hooks',
    '_forward_pre_hooks',
    '_pytree',
    '_exit',
    '_replace',
    '_asdict',
}
#: File, private name -> why it stands there. What a host calls of these is
#: tested in test_mm/test_host_internals.py.
PRIVATE = {
    ('mm/engine/optim.py', '_validate_cfg'): "overrides mmengine's",
    ('mm/evaluation/substitutes.py', '_dense_head'): 'of our Detector',
}
#: File, attribute -> why something of a host's is replaced outside of
#: host_internals.py.
REPLACED = {
    ('mm/backbones/absorbed.py', 'setattr'): 'a norm by nn.Identity',
}
#: Methods of the hosts' backbones that ours override or call.
OF_BACKBONES = {'_make_stage', '_freeze_stages'}
ACCESSORS = ('getattr', 'hasattr', 'setattr', 'delattr', '__setattr__')


def upper_files():
    tools = ROOT.parent / 'tools'
    for path in [*(ROOT / 'mm').rglob('*.py'), *tools.rglob('*.py')]:
        if path.name != 'host_internals.py':
            base = ROOT if ROOT in path.parents else ROOT.parent
            yield path.relative_to(base).as_posix(), path.read_text()


def is_private(name):
    return name.startswith('_') and not name.startswith('__')


def private_names(text):
    """Private attributes that a file takes from anything but its own."""
    tree = ast.parse(text)
    own = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            root = getattr(owner, 'id', None)
            itself = owner is node.value and root in ('self', 'cls', *own)
            if not itself and root not in ('torch', 'nn'):
                yield node.attr
        elif isinstance(node, ast.Call):
            name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
            if name in ACCESSORS:
                yield from (
                    arg.value
                    for arg in node.args
                    if isinstance(arg, ast.Constant)
                    and isinstance(arg.value, str)
                    and is_private(arg.value)
                )
        elif isinstance(node, ast.ImportFrom):
            top = (node.module or '').split('.')[0]
            for alias in node.names:
                if is_private(alias.name) and top not in ('torch', 'mmdbb'):
                    yield alias.name


def inherited_names(text):
    """Private methods that a file takes from `self` and does not define."""
    tree = ast.parse(text)
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(
            node.ctx, ast.Store
        ):
            own.add(node.attr)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and getattr(node.value, 'id', None) in ('self', 'cls')
            and is_private(node.attr)
            and node.attr not in own
        ):
            yield node.attr


def replaced_names(text):
    """Attributes of others to which a file gives a function, or `setattr`."""
    tree = ast.parse(text)
    functions = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    hosts = {
        (alias.asname or alias.name).split('.')[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if (getattr(node, 'module', None) or alias.name).split('.')[0]
        in ('mmengine', 'mmcv', *HOST_PACKAGES)
    }
    for node in ast.walk(tree):
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Delete)):
            for target in targets:
                if not isinstance(target, ast.Attribute):
                    continue
                root = target.value
                while isinstance(root, ast.Attribute):
                    root = root.value
                owner = getattr(root, 'id', '')
                value = getattr(getattr(node, 'value', None), 'id', None)
                if owner not in ('self', 'PORTS') and (
                    owner in hosts
                    or value in functions
                    or isinstance(node, ast.Delete)
                ):
                    yield target.attr
        elif isinstance(node, ast.Call):
            name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
            if name in ('setattr', 'delattr', '__setattr__'):
                yield name


@pytest.mark.parametrize('name, text', upper_files(), ids=lambda x: x[:40])
def test_private_parts_of_hosts_stand_in_one_file(name, text):
    for found in {*private_names(text)} - NOT_OF_HOSTS:
        assert (name, found) in PRIVATE, f'{found}: host_internals.py'
    for found in {*inherited_names(text)} - NOT_OF_HOSTS:
        of_backbone = name.startswith('mm/backbones/')
        if not (of_backbone and found in OF_BACKBONES):
            assert (name, found) in PRIVATE, found
    for found in replaced_names(text):
        if not name.startswith('tools/workshop'):  # replaces what is ours
            assert (name, found) in REPLACED, f'{found}: host_internals.py'


def test_exceptions_are_needed():
    texts = dict(upper_files())
    for name, found in PRIVATE:
        assert found in {*private_names(texts[name])}
    for name, found in REPLACED:
        assert found in {*replaced_names(texts[name])}


@pytest.mark.parametrize(
    'text, names',
    [
        ('runner._test_loop = 1', {'_test_loop'}),
        ('super()._validate_cfg()', {'_validate_cfg'}),
        ("getattr(module, '_is_init')", {'_is_init'}),
        ("object.__setattr__(config, '_filename', None)", {'_filename'}),
        ('from mmengine.config.utils import _hidden', {'_hidden'}),
        ('self._own, cls._own, __name__, x.__dict__', set()),
        ('self.runner._hooks', {'_hooks'}),
        ('nn.modules.batchnorm._BatchNorm', set()),
        ('class A:\n  _x = 1\nA._x', set()),
    ],
)
def test_the_test_of_private_names_bites(text, names):
    assert set(private_names(text)) == names


@pytest.mark.parametrize(
    'text, names',
    [
        ('from mmengine.runner import checkpoint as host\nhost.a = b', {'a'}),
        ('import mmcv\nmmcv.cnn.fuse_conv_bn = f', {'fuse_conv_bn'}),
        ('def f(): pass\nrunner.resume = f', {'resume'}),
        ('del head.forward', {'forward'}),
        ('setattr(place, name, 1)', {'setattr'}),
        ('def f(): pass\nself.a = f\nrunner.model = network', set()),
    ],
)
def test_the_test_of_replaced_names_bites(text, names):
    assert set(replaced_names(text)) == names


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
