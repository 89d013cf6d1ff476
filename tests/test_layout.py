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
#: The public faces, which pass on what others define.
FACES = ('backbones', 'deploy', 'export', 'prune', 'quantize')
#: The lower storey, which needs torch only. Each part may import from those
#: above it, and from itself. What is new belongs somewhere here.
LOWER = (
    ('version', 'errors', 'registry', 'scale_norm', 'dimensions', 'ranges'),
    ('ports', 'modules'),
    ('recompute',),
    ('geometry',),
    ('transforms', 'plain_conv'),
    ('kernels',),
    ('branches',),
    ('blocks',),
    ('own_blocks', 'gradient_map'),
    ('reparam', 'conv_norms', 'tracing', 'files'),
    ('found_norms', 'repopt', 'running', 'shares'),
    ('stock_weights', 'own_forward', 'folding'),
    ('plain', 'untouched'),
    ('official', 'merge_back'),
    ('insert', 'compare'),
    ('by_name', 'drop_branches'),
    ('yolo', 'proof'),
    ('report',),
)
#: The upper storey: folders and files of `mmdbb.mm`, on top of the lower.
UPPER = (
    ('mm.hosts',),
    ('mm',),
    ('mm.host_internals',),
    ('mm.host_loading', 'mm.config_files', 'mm.config_types', 'mm.data_flow'),
    ('mm.backbones', 'mm.stock', 'mm.structure', 'mm.upsample'),
    # What outputs are read again by.
    ('mm.deploy.load', 'mm.deploy.images'),
    ('mm.outputs',),
    ('mm.deploy',),
    ('mm.export',),
    ('mm.official',),
    ('mm.starts',),
    ('mm.engine',),
    ('mm.evaluation',),
    ('mm.quantization', 'mm.checkpoint_report'),
    ('mm.pruning', 'mm.inference'),
    ('mm.registration',),
    FACES,
)
LAYERS = LOWER + UPPER
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(path for path in ROOT.rglob('*.py') if '.mim' not in path.parts)
HOST_PACKAGES = ('mmpretrain', 'mmdet', 'mmseg')


def module_of(path, root=ROOT):
    parts = ('mmdbb', *path.relative_to(root).with_suffix('').parts)
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports_of(path, root=ROOT):
    """Full names of all modules that a file imports, wherever it does."""
    package = module_of(path, root).split('.')
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
    file = '.'.join(names[:3])
    if file in RANK:  # of its folder, but on a floor of its own
        return file
    return '.'.join(names[:2] if names[0] == 'mm' else names[:1])


INNER = [path for path in FILES if path != ROOT / '__init__.py']


def check_directions(path, root=ROOT):
    """Fail if a file imports from its own floor or from above it."""
    part = part_of(module_of(path, root))
    assert part in RANK, f'say in LAYERS where mmdbb.{part} belongs'
    for name in imports_of(path, root):
        if not name.startswith('mmdbb.'):
            # From the package itself nothing is imported inside of it.
            assert name != 'mmdbb' or path.name == '__init__.py', name
            continue
        other = part_of(name)
        if other in RANK and other != part:
            assert RANK[other] < RANK[part], f'{part} imports {other}'


@pytest.mark.parametrize('path', INNER, ids=module_of)
def test_imports_point_one_way(path):
    check_directions(path)


@pytest.mark.parametrize(
    ('place', 'source', 'message'),
    [
        (
            'blocks/new.py',
            'import mmdbb.mm.pruning',
            'blocks imports mm.pruning',
        ),
        ('blocks/new.py', 'from mmdbb import insert', 'blocks imports insert'),
        ('blocks/new.py', 'from ..reparam import find_blocks', 'reparam'),
        ('blocks/__init__.py', 'from ..reparam import a', 'imports reparam'),
        ('geometry.py', 'from . import transforms', 'imports transforms'),
        (
            'branches/new.py',
            'def late():\n    from mmdbb.blocks.dbb import DBB',
            'branches imports blocks',
        ),
        # Two of one floor know nothing of each other.
        ('tracing.py', 'from mmdbb.reparam import a', 'tracing imports'),
        ('blocks/new.py', 'import mmdbb', 'mmdbb'),
        ('elsewhere/new.py', 'import torch', 'say in LAYERS where'),
    ],
)
def test_the_test_of_directions_bites(tmp_path, place, source, message):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    allowed = 'import torch\nfrom mmdbb.errors import UserError\n'
    if place.startswith('blocks/'):
        allowed += 'from .base import Base\nfrom ..geometry import pad2d\n'
        path.write_text(allowed)
        check_directions(path, tmp_path)
    path.write_text(f'{allowed}{source}\n')
    with pytest.raises(AssertionError, match=message):
        check_directions(path, tmp_path)


@pytest.mark.parametrize(
    'path',
    [p for p in INNER if RANK.get(part_of(module_of(p)), 99) < 5],
    ids=module_of,
)
def test_the_core_names_no_host_package(path):
    """What a user of plain PyTorch gets needs mmengine and mmcv only."""
    assert not set(imports_of(path)) & set(HOST_PACKAGES)


def names_of(path):
    """Names that a module defines at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield from (
                name.id
                for name in ast.walk(node)
                if isinstance(name, ast.Name)
            )


def test_names_are_imported_from_the_modules_that_define_them():
    """But for packages' names and the public faces, which pass names on."""
    owned = {
        module_of(path): set(names_of(path))
        for path in FILES
        if path.name != '__init__.py' and part_of(module_of(path)) not in FACES
    }
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in owned:
                names = {alias.name for alias in node.names}
                assert names <= owned[node.module], path


TOOLS = sorted((ROOT.parent / 'tools').glob('*.py'))
#: What still works in a tool, by file.
WORKING = {}


def work_in(source):
    """Names of what does more than parse arguments, call and print.

    Classes; functions with a loop in a loop, of any kind, or with more than
    20 statements, unless they add arguments to a parser.
    """
    loops = (ast.For, ast.While, ast.comprehension)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        if not isinstance(node, ast.FunctionDef):
            continue
        inner = list(ast.walk(node))
        nested = any(
            isinstance(loop, (ast.For, ast.While))
            and sum(isinstance(n, loops) for n in ast.walk(loop)) > 1
            for loop in inner
        )
        long = sum(isinstance(n, ast.stmt) for n in inner) > 21
        if nested or any(isinstance(n, ast.While) for n in inner):
            yield node.name
        elif long and node.name != 'parse_args':
            yield node.name


@pytest.mark.parametrize('path', TOOLS, ids=lambda path: path.name)
def test_tools_only_parse_arguments(path):
    working = WORKING.get(path.name, set())
    assert set(work_in(path.read_text())) == working, (
        f'{path.name} has work in it that belongs into the package'
    )


@pytest.mark.parametrize(
    'work',
    [
        'class Job:\n    pass',
        'def job():\n    while True:\n        step()',
        'def job(a):\n    for i in a:\n        b = [j for j in i]',
        'def job(a):\n    for i in a:\n        for j in i:\n            f(j)',
        'def job():\n' + '    step()\n' * 21,
    ],
)
def test_the_test_of_tools_bites(work):
    tool = (
        'def parse_args():\n'
        + '    parser.add_argument()\n' * 30
        + 'def main():\n    for row in run(parse_args()):\n        print(row)'
    )
    assert not list(work_in(tool))
    assert [name.lower() for name in work_in(f'{tool}\n{work}')] == ['job']


#: The most parameters of a function, `self` not counted: what is more belongs
#: into a dataclass or a NamedTuple with a docstring.
MOST_PARAMETERS = 8
#: Functions that may take more, because others say what they take: the
#: reason, and their names.
TAKE_MORE = {
    "nn.Conv2d's arguments": (
        'blocks.base.ReparamConv2d.__init__',
        'geometry.ConvSpec.__init__',  # for type checkers; a dataclass's own
    ),
    "nn.ConvTranspose2d's": ('blocks.forms._Transposed.__init__',),
    "nn.Conv2d's arguments and the papers', by position too": (
        'official.blocks.ACBlock.__init__',
        'official.blocks.DiverseBranchBlock.__init__',
        'official.blocks.RepVGGBlock.__init__',
        'official.mobileone.MobileOneBlock.__init__',
        'official.orepa.OREPA.__init__',
        'official.orepa.OREPA_1x1.__init__',
        'official.orepa.OREPA_LargeConvBase.__init__',
        'official.orepa.RepVGGBlock_OREPA.__init__',
    ),
    "what configs give mmpretrain's own networks and blocks": (
        'mm.backbones.alexnet.PlainAlexNet.__init__',
        'mm.backbones.mobilenet.MobileNetV1.__init__',
        'mm.backbones.repvgg.RepVGGUnit.__init__',
        'mm.backbones.unireplknet.PlainUniRepLKNet.__init__',
    ),
    "arguments of torch's _rebuild_tensor_v3, as files have them": (
        'files.values.Values._tensor_3',
    ),
}
#: Functions whose results are tuples of a form that others laid down.
#: Name -> what stands in the tuple.
UNPACKED = {
    '_of': "an argument of numpy's own pickles",
    'groups': 'mode, epoch, step and number of steps in a line of a log',
    'unbind': 'left, top, right and bottom of boxes',
}


def functions_of(path):
    """Full names of all functions of a file, with their definitions."""

    def inside(node, name):
        for child in ast.iter_child_nodes(node):
            named = isinstance(
                child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            )
            full = f'{name}.{child.name}' if named else name
            if named and not isinstance(child, ast.ClassDef):
                yield full, child
            yield from inside(child, full)

    return inside(ast.parse(path.read_text()), module_of(path))


def parameters_of(function):
    given = function.args
    names = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    names = [parameter.arg for parameter in names]
    rest = [p.arg for p in (given.vararg, given.kwarg) if p is not None]
    return [*names[names[:1] in (['self'], ['cls']) :], *rest]


def test_functions_take_few_parameters():
    counts = {
        name: len(parameters_of(function))
        for path in FILES
        for name, function in functions_of(path)
    }
    many = {n for n, count in counts.items() if count > MOST_PARAMETERS}
    known = {f'mmdbb.{name}' for names in TAKE_MORE.values() for name in names}
    assert many == known


def unpacked_calls(tree):
    """Names of functions whose results are taken apart by position."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if (
                isinstance(target, ast.Tuple)
                and len(target.elts) > 3
                and isinstance(node.value, ast.Call)
            ):
                function = node.value.func
                yield getattr(function, 'attr', getattr(function, 'id', ''))


def test_results_are_read_by_name():
    found = {
        name
        for path in FILES
        for name in unpacked_calls(ast.parse(path.read_text()))
    }
    assert found == set(UNPACKED)


def test_the_tests_of_signatures_bite():
    (function,) = ast.parse('def f(self, a, *b, c=1, **d): pass').body
    assert parameters_of(function) == ['a', 'c', 'b', 'd']
    assert list(unpacked_calls(ast.parse('a, b, c, d = x.f()'))) == ['f']
    assert not list(unpacked_calls(ast.parse('a, b, c = f()')))


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


@pytest.mark.usefixtures('quiet')  # else hosts' logs are taken for output
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
