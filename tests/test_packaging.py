"""What an installation holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fresh import TREES, checkout, pip

import mmdbb

ROOT = Path(__file__).resolve().parents[1]
#: What serves the work on mmdbb itself.
WORKSHOP = (
    'benchmark',
    'build_docs',
    'build_release',
    'demo',
    'demo_torch',
    'model_zoo',
    'prepare_demo_data',
    'study',
    'sweep',
)


def is_shipped(path):
    """Whether a path, relative to the checkout, belongs into a wheel."""
    parts = path.parts
    workshop = parts[0] == 'tools' and (
        parts[1] == 'workshop' or path.stem in WORKSHOP
    )
    return not workshop and not {'.mim', '__pycache__'} & set(parts)


def sources():
    """Paths of what should be shipped, relative to the checkout."""
    return {
        str(path.relative_to(ROOT))
        for tree in TREES
        for path in (ROOT / tree).rglob('*')
        if path.is_file() and is_shipped(path.relative_to(ROOT))
    }


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = checkout(tmp_path_factory.mktemp('checkout'))
    out = tmp_path_factory.mktemp('wheel')
    pip('wheel', '.', '-w', str(out), cwd=folder)
    (path,) = out.glob('*.whl')
    return path


def test_wheel_is_named_by_the_version(wheel):
    assert wheel.name == f'mmdbb-{mmdbb.__version__}-py3-none-any.whl'


def test_wheel_holds_the_package_and_its_mim_folder(wheel):
    names = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if '.dist-info/' not in name
    }
    expected = {
        path if path.startswith('mmdbb/') else f'mmdbb/.mim/{path}'
        for path in sources()
        if not path.startswith('mmdbb/') or path.endswith(('.py', '.typed'))
    }
    index = ROOT / 'model-index.yml'
    if index.exists():
        expected.add('mmdbb/.mim/model-index.yml')
    assert names == expected
    assert 'mmdbb/.mim/tools/train.py' in names
    assert 'mmdbb/.mim/configs/resnet18_dbb_imagenet.py' in names


def test_wheel_has_no_workshop(wheel):
    """Its tools read what only a checkout has: tests, docs, pictures."""
    file = zipfile.ZipFile(wheel)
    tools = [n for n in file.namelist() if n.startswith('mmdbb/.mim/tools/')]
    assert tools
    for name in tools:
        assert 'workshop' not in name
        assert Path(name).stem not in WORKSHOP
        assert b'workshop' not in file.read(name), name
    # Each front of the workshop is known here.
    fronts = {
        path.stem
        for path in (ROOT / 'tools').glob('*.py')
        if 'workshop' in path.read_text()
    }
    assert fronts == set(WORKSHOP)


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith('/METADATA'))
        text = file.read(name).decode()
    assert 'Requires-Python: >=3.9' in text
    required = [
        line.partition(': ')[2]
        for line in text.splitlines()
        if line.startswith('Requires-Dist: ') and 'extra ==' not in line
    ]
    # numpy reads checkpoints; torch does without.
    assert required == ['torch>=2.1', 'numpy']
    for extra in ('demo', 'tests', 'onedl', 'openmmlab'):
        assert f'Provides-Extra: {extra}' in text


def test_installed_configs_and_tools_work(wheel, tmp_path):
    site = tmp_path / 'site'
    pip('install', str(wheel), '--target', str(site), cwd=tmp_path)
    mim = site / 'mmdbb/.mim'
    code = (
        f'import sys; sys.path.insert(0, {str(site)!r})\n'
        'import mmdbb; from mmengine.config import Config\n'
        f'assert mmdbb.__file__.startswith({str(site)!r})\n'
        f'path = {str(mim / "configs/resnet50_acb_imagenet.py")!r}\n'
        'config = Config.fromfile(path, import_custom_modules=False)\n'
        'assert config.model.backbone.block.type == "ACB"\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)
    run = subprocess.run(
        [sys.executable, str(mim / 'tools/train.py'), '--help'],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert '--auto-scale-lr' in run.stdout


def test_editable_installation_links(tmp_path):
    folder = checkout(tmp_path)
    prefix = tmp_path / 'prefix'
    pip('install', '-e', '.', '--prefix', str(prefix), cwd=folder)
    for name in ('configs', 'tools'):
        link = folder / 'mmdbb/.mim' / name  # the workshop too
        assert link.is_symlink()
        assert link.resolve() == (folder / name).resolve()
    # Installing again is fine.
    pip('install', '-e', '.', '--prefix', str(prefix), cwd=folder)


def test_building_leaves_nothing_that_git_sees(tmp_path):
    folder = checkout(tmp_path)
    shutil.copy(ROOT / '.gitignore', folder)
    git = ['git', '-c', 'user.name=t', '-c', 'user.email=t@t.invalid']
    for arguments in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'x']):
        subprocess.run([*git, *arguments], check=True, cwd=folder)
    pip('install', '-e', '.', '--prefix', str(tmp_path / 'build'), cwd=folder)
    pip('wheel', '.', '-w', str(tmp_path / 'dist'), cwd=folder)
    status = subprocess.run(
        [*git, 'status', '--porcelain'],
        check=True,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert status.stdout == ''
