"""What is said when a host package is missing or of a wrong version."""

import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from mmdbb.mm.host_internals import cure_config_bases
from mmdbb.mm.hosts import HOSTS, check_version, require

ROOT = Path(__file__).resolve().parent.parent


def allowed(name):
    """The range of the stack that is installed."""
    openmmlab, onedl = HOSTS[name]
    try:
        importlib.metadata.version(onedl.name)
        return onedl.allowed
    except importlib.metadata.PackageNotFoundError:
        return openmmlab.allowed


@pytest.mark.parametrize('name', HOSTS)
def test_require_returns_the_module(name):
    module = require(name)
    assert module.__name__ == name


def test_require_refuses_other_names():
    with pytest.raises(ValueError, match="mmengine, .*got 'mmpose'"):
        require('mmpose')


@pytest.mark.parametrize('name', HOSTS)
@pytest.mark.parametrize('version', ['0.1.0', '99.0'])
def test_wrong_version_is_named(name, version):
    with pytest.raises(ImportError) as error:
        check_version(name, version)
    message = str(error.value)
    assert f'needs {name} ({allowed(name)}; ' in message
    assert f'found: {version})' in message
    assert ' install "' in message


@pytest.mark.parametrize(
    'version', ['2.1.0', '2.1.0+cu118', '2.1.0rc1', '2.3.6']
)
def test_allowed_versions(version):
    check_version('mmcv', version)


@pytest.mark.parametrize('version', ['2.2.0', '2.3.5', '3.0.0'])
def test_mmcv_that_mmdet_refuses_is_refused(version):
    with pytest.raises(ImportError, match=f'found: {version}'):
        check_version('mmcv', version)


def test_mmcv_is_what_mmdet_and_mmseg_accept():
    """Their own bounds, on the stack that is installed."""
    from mmengine.utils import digit_version

    openmmlab, onedl = HOSTS['mmcv']
    own = onedl if allowed('mmcv') == onedl.allowed else openmmlab
    for name, low, high in (
        ('mmdet', 'mmcv_minimum_version', 'mmcv_maximum_version'),
        ('mmseg', 'MMCV_MIN', 'MMCV_MAX'),
    ):
        module = require(name)
        assert digit_version(getattr(module, low)) <= digit_version(
            own.minimum
        )
        assert digit_version(own.below) <= digit_version(getattr(module, high))


# The only place with ranges


def test_the_file_of_ranges_is_light():
    """setup.py runs it where nothing is installed yet."""
    code = (
        'import runpy, sys\n'
        f'runpy.run_path({str(ROOT / "mmdbb/mm/hosts.py")!r})\n'
        "assert not {'torch', 'mmdbb', 'mmengine'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, '-I', '-S', '-c', code], check=True)


def requirement_files(stack):
    for name in (f'{stack}.txt', f'mmcv-{stack}.txt'):
        yield from (ROOT / 'requirements' / name).read_text().splitlines()


@pytest.mark.parametrize('stack', ['openmmlab', 'onedl'])
def test_pinned_versions_lie_in_the_ranges(stack):
    pins = dict(
        line.split('==') for line in requirement_files(stack) if '==' in line
    )
    for host in HOSTS.values():
        distribution = getattr(host, stack)
        assert distribution.has(pins[distribution.name]), distribution


def test_ranges_are_written_down_once():
    """Where others name a range, it is the one of hosts.py."""
    ranges = {
        each.name: each.allowed for host in HOSTS.values() for each in host
    }
    names = '|'.join(sorted(ranges, key=len, reverse=True))
    written = re.compile(
        rf'(?<![\w-])({names})\s*((?:[<>=]=?\s*\d[\w.]*,?\s*)+)'
    )
    assert written.search('see "mmcv>=2.0,<3"')
    paths = [ROOT / 'setup.py', ROOT / 'README.md', ROOT / 'SECURITY.md']
    for pattern in ('docs/*.md', 'requirements/*', 'mmdbb/**/*.py'):
        paths += ROOT.glob(pattern)
    for path in paths:
        if path.name == 'changelog.md':  # tells of what was
            continue
        for name, found in written.findall(path.read_text()):
            found = found.replace(' ', '').rstrip(',')
            if not found.startswith('=='):
                assert found == ranges[name], f'{path.name}: {name} {found}'


# What is said


def fake(folder, name, source):
    package = folder / name
    package.mkdir()
    (package / '__init__.py').write_text(source)


def message_of_import(folder, name, hide=False):
    """Require `name` in a process of its own; the last line of stderr."""
    finder = (
        'import sys\n'
        'class Hidden:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        f'        if name == {name!r}:\n'
        '            raise ModuleNotFoundError(name, name=name)\n'
        'sys.meta_path.insert(0, Hidden())\n'
    )
    code = (finder if hide else '') + (
        f'import sys; sys.path.insert(0, {str(folder)!r})\n'
        f'import mmdbb.mm.hosts; mmdbb.mm.hosts.require({name!r})'
    )
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert run.returncode == 1
    return run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize('name', ['mmengine', 'mmcv', 'mmseg'])
def test_missing_package_is_named(tmp_path, name):
    message = message_of_import(tmp_path, name, hide=True)
    assert f' mmdbb needs {name} (>=' in message
    assert 'not installed' in message and ' install "' in message


def test_old_package_is_named(tmp_path):
    fake(tmp_path, 'mmseg', '__version__ = "0.30.0"')
    message = message_of_import(tmp_path, 'mmseg')
    assert f' mmdbb needs mmseg ({allowed("mmseg")}; ' in message
    assert 'found: 0.30.0' in message


def hidden(*names):
    """Code after which packages seem not to be installed."""
    return (
        'import importlib.metadata, sys\n'
        f'names = {names!r}\n'
        'class Hidden:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        '        if name in names:\n'
        '            raise ModuleNotFoundError(name, name=name)\n'
        'sys.meta_path.insert(0, Hidden())\n'
        'def version(name):\n'
        '    raise importlib.metadata.PackageNotFoundError(name)\n'
        'importlib.metadata.version = version\n'
    )


ALL = {
    'mmdbb.mm': ('mmengine', 'mmcv'),
    'mmdbb.deploy': ('mmengine', 'mmcv'),
    'mmdbb.backbones': ('mmengine', 'mmcv', 'mmpretrain'),
}


@pytest.mark.parametrize('module', ALL)
def test_one_message_names_all_that_is_missing(module):
    code = hidden(*HOSTS) + (
        'import importlib\n'
        'try:\n'
        f'    importlib.import_module({module!r})\n'
        'except ImportError as error:\n'
        '    print(error)\n'
    )
    run = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
    )
    needs = [
        f'{name} ({HOSTS[name].openmmlab.allowed}; not installed)'
        for name in ALL[module]
    ]
    wanted = ' '.join(f'"{HOSTS[name].openmmlab}"' for name in ALL[module])
    assert run.stdout == (
        f'mmdbb needs {", ".join(needs[:-1])} and {needs[-1]}. Install them '
        f'with: pip install openmim && mim install {wanted}\n'
    )


def test_the_command_is_of_the_stack_in_use(monkeypatch):
    known = {'onedl-mmengine': '0.10.12'}

    def version(name):
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(importlib.metadata, 'version', version)
    with pytest.raises(ImportError) as error:
        check_version('mmcv', '2.2.0')
    assert str(error.value) == (
        'mmdbb needs mmcv (>=2.3.6,<3.0.0; found: 2.2.0). Install it with: '
        'pip install "onedl-mmcv>=2.3.6,<3.0.0"'
    )
    known.clear()
    with pytest.raises(ImportError) as error:
        check_version('mmdet', '3.1.0')
    assert str(error.value).endswith(
        'Install it with: pip install "mmdet>=3.2.0,<4.0.0"'
    )


def test_extras_are_the_ranges(monkeypatch):
    extras = extras_of_setup(monkeypatch)
    for stack in ('openmmlab', 'onedl'):
        found = [item for item in extras[stack] if 'mm' in item]
        assert found == [str(getattr(h, stack)) for h in HOSTS.values()]


def extras_of_setup(monkeypatch):
    import setuptools

    found = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **kw: found.update(kw))
    runpy.run_path(str(ROOT / 'setup.py'))
    assert found['install_requires'] == ['torch>=2.1', 'numpy']
    return found['extras_require']


def test_host_that_refuses_its_own_hosts(tmp_path):
    fake(tmp_path, 'mmdet', 'assert False, "MMCV==9 is incompatible"')
    message = message_of_import(tmp_path, 'mmdet')
    assert message.startswith('ImportError: mmdet cannot be imported')
    assert 'MMCV==9' in message


def test_what_a_host_misses_is_not_blamed_on_the_host(tmp_path):
    fake(tmp_path, 'mmseg', 'import a_missing_dependency')
    message = message_of_import(tmp_path, 'mmseg')
    assert "No module named 'a_missing_dependency'" in message


def test_bases_of_mmseg_are_found_on_either_stack():
    cure_config_bases()
    try:
        importlib.metadata.version('mmsegmentation')
        assert MODULE2PACKAGE['mmseg'] == 'mmsegmentation'
    except importlib.metadata.PackageNotFoundError:
        assert MODULE2PACKAGE['mmseg'] == 'mmseg'
    path = 'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    text = f"_base_ = 'mmseg::{path}'"
    config = Config.fromstring(text, '.py')
    assert config.model.decode_head.type == 'PSPHead'
