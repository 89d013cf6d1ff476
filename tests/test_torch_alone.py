"""mmdbb where nothing but torch is installed, and from where it is found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import Fresh, checkout, pip
from test_docs import blocks_of

from mmdbb.mm.hosts import HOSTS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name('torch_alone.py')
#: Pages of which all that needs no host runs in plain torch.
PAGES = [
    ROOT / 'README.md',
    ROOT / 'docs' / 'plain_pytorch.md',
]
NEEDS_MORE = re.compile(
    r'\b(mmengine|mmcv|mmpretrain|mmdet|mmseg|torchvision|timm)\b'
    r'|\bmmdbb\.(mm|backbones|deploy|export|quantize|prune)\b'
)


def passages(page):
    return [
        block
        for block in blocks_of(page, 'python')
        if not NEEDS_MORE.search(block.text)
    ]


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """torch, and mmdbb by `pip install .`; in a folder with other files."""
    folder = tmp_path_factory.mktemp('alone')
    fresh = Fresh(folder / 'env')
    fresh.install(checkout(folder / 'checkout'))
    return fresh


def test_there_is_torch_and_nothing_else(alone, tmp_path):
    code = (
        'import importlib.util, mmdbb, numpy, torch\n'
        "names = 'PIL scipy packaging matplotlib torchvision rich'.split()\n"
        f'for name in [*names, *{tuple(HOSTS)!r}]:\n'
        '    assert importlib.util.find_spec(name) is None, name\n'
        'print(mmdbb.__file__)\n'
    )
    found = alone.run('-c', code, cwd=tmp_path)
    assert found.startswith(str(alone.site))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_passages_of_the_docs_run(alone, page, tmp_path):
    found = passages(page)
    assert found
    script = tmp_path / 'passages.py'
    # At the lines where they stand, for tracebacks.
    lines = []
    for block in found:
        lines += [''] * (block.line - len(lines)) + block.text.splitlines()
    script.write_text('\n'.join(lines))
    alone.run(script, cwd=tmp_path)


def test_the_tour_runs(alone, tmp_path):
    assert alone.run(ROOT / 'docs' / 'tour.py', cwd=tmp_path)


def test_all_names_are_there(alone, tmp_path):
    code = (
        'import mmdbb\n'
        'from mmdbb import *\n'
        'for name in mmdbb.__all__:\n'
        '    assert hasattr(mmdbb, name) and name in globals(), name\n'
        "assert 'ReparamHook' not in mmdbb.__all__\n"
        "assert 'DBB' in mmdbb.__all__\n"
    )
    alone.run('-c', code, cwd=tmp_path)


NEEDS = {
    'from mmdbb import ReparamHook': ('mmengine', 'mmcv'),
    'from mmdbb import load_deployed': ('mmengine', 'mmcv'),
    'import mmdbb.deploy': ('mmengine', 'mmcv'),
    'import mmdbb.export': ('mmengine', 'mmcv'),
    'import mmdbb.quantize': ('mmengine', 'mmcv'),
    'import mmdbb.prune': ('mmengine', 'mmcv'),
    'import mmdbb.backbones': ('mmengine', 'mmcv', 'mmpretrain'),
}


def test_what_needs_hosts_says_so_once(alone, tmp_path):
    code = (
        'statements = ' + repr(list(NEEDS)) + '\n'
        'for statement in statements:\n'
        '    try:\n'
        '        exec(statement)\n'
        '    except ImportError as error:\n'
        '        print(error)\n'
        '    else:\n'
        '        raise AssertionError(statement)\n'
    )
    messages = alone.run('-c', code, cwd=tmp_path).splitlines()
    assert len(messages) == len(NEEDS)
    for message, names in zip(messages, NEEDS.values()):
        wanted = [HOSTS[name].openmmlab for name in names]
        for name, each in zip(names, wanted):
            assert f'{name} ({each.allowed}; not installed)' in message
        command = ' '.join(f'"{each}"' for each in wanted)
        assert message.endswith(f'mim install {command}')


def test_import_brings_nothing_but_torch(alone, tmp_path):
    """What takes the time of an import; `benchmark.py --import` measures it.

    torch compiles, exports and differentiates functions by parts of it that
    it imports when they are asked for; they take longer than the rest.
    """
    code = (
        'import sys, torch\n'
        'before = set(sys.modules)\n'
        'import mmdbb\n'
        'new = set(sys.modules) - before\n'
        "tops = {name.partition('.')[0] for name in new}\n"
        "assert tops <= {'mmdbb', 'torch', *sys.stdlib_module_names}, tops\n"
        "parts = ('torch._dynamo', 'torch._inductor', 'torch.onnx',\n"
        "         'torch._functorch', 'torch.export', 'torch.fx')\n"
        'heavy = [name for name in new if name.startswith(parts)]\n'
        'assert not heavy, heavy\n'
        "assert not [n for n in new if n.startswith('mmdbb.mm')]\n"
    )
    alone.run('-c', code, cwd=tmp_path)


def test_training_and_merging_alone(alone, tmp_path):
    assert 'modules' in alone.run(SCRIPT, cwd=tmp_path)


def test_nothing_else_is_imported_beside_hosts():
    """The same in the tests' own environment, where there is more to find."""
    run = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize('name', ['mmdbb', 'other'])
def test_editable_installation_is_found_from_everywhere(name, tmp_path):
    """A folder of the package's name hides it as a namespace package."""
    fresh = Fresh(tmp_path / 'env')
    folder = checkout(tmp_path / 'work' / name)
    fresh.install(folder, '-e')
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    code = 'import mmdbb; mmdbb.DBB; print(mmdbb.__file__)'
    for place in (folder.parent, folder, elsewhere):
        found = fresh.run('-c', code, cwd=place)
        assert found.strip() == str(folder / 'mmdbb' / '__init__.py')
    # With the checkout on the path its other folders are found too. A real
    # package of their names wins, wherever it stands.
    (fresh.site / 'tools').mkdir()
    (fresh.site / 'tools' / '__init__.py').write_text('REAL = True')
    code = (
        'import importlib.util, tools; assert tools.REAL\n'
        "for name in ('workshop', 'helpers', 'conftest', 'train'):\n"
        '    assert importlib.util.find_spec(name) is None, name\n'
    )
    fresh.run('-c', code, cwd=elsewhere)


def test_no_folder_of_the_checkout_hides_a_package():
    """What an editable installation puts on the path besides the package."""
    found = {path.parent.name for path in ROOT.glob('*/__init__.py')}
    assert found == {'mmdbb'}
    assert {path.name for path in ROOT.glob('*.py')} == {'setup.py'}


def test_source_distribution_installs(tmp_path):
    """It has what setup.py reads; --no-deps, for there is no network."""
    folder = checkout(tmp_path / 'checkout')
    code = (
        'from setuptools.build_meta import build_sdist\n'
        f'print(build_sdist({str(tmp_path)!r}))\n'
    )
    subprocess.run(
        [sys.executable, '-c', code],
        check=True,
        cwd=folder,
        capture_output=True,
    )
    (archive,) = tmp_path.glob('mmdbb-*.tar.gz')
    pip('wheel', str(archive), '-w', str(tmp_path / 'out'), cwd=tmp_path)
    assert list((tmp_path / 'out').glob('mmdbb-*.whl'))
