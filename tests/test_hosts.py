"""What is said when a host package is missing or of a wrong version."""

import importlib.metadata
import subprocess
import sys

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from mmdbb.mm.hosts import HOSTS, check_version, cure_config_bases, require


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
    host = HOSTS[name]
    assert f'needs {name} >={host.minimum},<{host.below}' in message
    assert f'found: {version}' in message
    assert ' install "' in message


@pytest.mark.parametrize('version', ['2.1.0', '2.1.0+cu118', '2.1.0rc1'])
def test_allowed_versions(version):
    check_version('mmcv', version)


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
    assert message.startswith(f'ImportError: mmdbb needs {name} >=')
    assert 'not installed' in message and ' install "' in message


def test_old_package_is_named(tmp_path):
    fake(tmp_path, 'mmseg', '__version__ = "0.30.0"')
    message = message_of_import(tmp_path, 'mmseg')
    assert message.startswith('ImportError: mmdbb needs mmseg >=1.2.0')
    assert 'found: 0.30.0' in message


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
