"""Killed, interrupted or out of disk: the old files or the new ones."""

import errno
import itertools
import os
import resource
import shutil
import signal
import tempfile
import time

import pytest
import torch
from helpers import deploy
from mmengine.config import Config
from networks import write_checkpoint, write_config

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.files.formats import write_checkpoint as write

pytestmark = [
    pytest.mark.usefixtures('quiet'),
    pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks'),
]
NAMES = ('a.pth', 'a.py')


def state(number):
    return {f'w{i}': torch.full((20_000,), float(number)) for i in range(4)}


def write_pair(folder, number, overwrite=True):
    outputs = [str(folder / name) for name in NAMES]
    with all_or_nothing(*outputs, overwrite=overwrite) as drafts:
        write(drafts[0], state(number), dict(number=number))
        with open(drafts[1], 'w') as file:
            file.write(f'number = {number}\n')


def numbers(folder):
    """What the two files hold; each must be whole."""
    loaded = read_checkpoint(str(folder / NAMES[0]))
    number = loaded['meta']['number']
    for value in loaded['state_dict'].values():
        assert value.shape == (20_000,) and value.unique().item() == number
    return number, Config.fromfile(folder / NAMES[1]).number


def forked(work):
    """Start work in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def signalled(folder, number, after):
    """Write in another process, and signal it some time after the first."""
    read, started = os.pipe()
    pid = forked(lambda: keep_writing(folder, started))
    os.close(started)
    assert os.read(read, 1), 'it failed at once'
    time.sleep(after)
    # Again after a second: Python drops an interrupt that it raises while an
    # object is finalised. A process that does not end must not hang the tests.
    for _ in range(30):
        os.kill(pid, number)
        ended, status = ended_within(pid, seconds=1)
        if ended:
            break
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError(f'signal {number} did not end the process')
    os.close(read)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else status >> 8


def ended_within(pid, seconds):
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended or time.monotonic() > deadline:
            return ended, status
        time.sleep(0.002)


def keep_writing(folder, started):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in itertools.count(1):
        write_pair(folder, number)
        os.write(started, b'.')


MOMENTS = [0.0013 * i for i in range(25)]


def test_killed(tmp_path):
    write_pair(tmp_path, 0)
    seen = set()
    for after in MOMENTS:
        code = signalled(tmp_path, signal.SIGKILL, after)
        assert code == -signal.SIGKILL
        pair = numbers(tmp_path)
        # One file after the other: the second may be one step behind.
        assert pair[0] - pair[1] in (0, 1)
        seen.add(pair)
    assert len(seen) > 1
    # The next run is not disturbed by what the killed ones left.
    write_pair(tmp_path, 7)
    assert numbers(tmp_path) == (7, 7)


def test_a_folder_that_is_missing_shows_at_once(tmp_path):
    outputs = str(tmp_path / 'new' / 'a.pth'), str(tmp_path / 'b' / 'a.onnx')
    with pytest.raises(UserError, match='no such folder: .*b, for .*onnx'):
        with all_or_nothing(*outputs):
            raise AssertionError('too late')
    assert not list(tmp_path.iterdir())


def test_outputs_on_two_file_systems(tmp_path):
    if not os.path.isdir('/dev/shm'):
        pytest.skip('no second file system')
    other = tempfile.mkdtemp(dir='/dev/shm')
    try:
        if os.stat(other).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip('no second file system')
        # The same file name in both: they must not meet on the way.
        outputs = [str(tmp_path / 'a.pth'), os.path.join(other, 'a.pth')]
        for number in range(4):
            with all_or_nothing(*outputs, overwrite=number > 0) as drafts:
                for draft, output in zip(drafts, outputs):
                    with open(draft, 'w') as file:
                        file.write(f'{number} {output}')
            for output in outputs:
                with open(output) as file:
                    assert file.read() == f'{number} {output}'
                assert os.listdir(os.path.dirname(output)) == ['a.pth']
    finally:
        shutil.rmtree(other)


def test_one_output_twice(tmp_path):
    names = [str(tmp_path / 'a'), str(tmp_path / 'b' / '..' / 'a')]
    with pytest.raises(UserError, match='two outputs of one name: '):
        with all_or_nothing(*names, overwrite=True):
            pytest.fail('too late')
    assert not list(tmp_path.iterdir())


def test_interrupted(tmp_path):
    write_pair(tmp_path, 0)
    seen = set()
    for after in MOMENTS[::2]:
        assert signalled(tmp_path, signal.SIGINT, after) == 130
        pair = numbers(tmp_path)
        assert pair[0] == pair[1]
        assert sorted(os.listdir(tmp_path)) == sorted(NAMES)
        seen.add(pair)
    assert len(seen) > 1


@pytest.mark.parametrize('overwrite', [True, False])
def test_a_move_that_fails_is_taken_back(tmp_path, overwrite):
    """The second output cannot be placed: the first is as it was."""
    if overwrite:
        write_pair(tmp_path, 1)
        os.remove(tmp_path / NAMES[1])
    with (
        pytest.raises(OSError if overwrite else UserError),
        all_or_nothing(
            *[str(tmp_path / name) for name in NAMES], overwrite=overwrite
        ) as drafts,
    ):
        write(drafts[0], state(2), dict(number=2))
        with open(drafts[1], 'w') as file:
            file.write('number = 2\n')
        os.mkdir(tmp_path / NAMES[1])  # meanwhile, by another process
    left = os.listdir(tmp_path)
    if overwrite:
        assert sorted(left) == sorted(NAMES)
        loaded = read_checkpoint(str(tmp_path / NAMES[0]))
        assert loaded['meta']['number'] == 1
    else:
        assert left == [NAMES[1]]


@pytest.mark.parametrize('name', ['full.pth', 'full.safetensors'])
def test_full_device(tmp_path, name):
    if name.endswith('safetensors'):
        pytest.importorskip('safetensors')
    if not os.path.exists('/dev/full'):
        pytest.skip('no /dev/full')
    (tmp_path / name).symlink_to('/dev/full')
    with pytest.raises(
        UserError, match=f'cannot write {name}: No space left on device'
    ):
        write(str(tmp_path / name), state(1), {})


@pytest.mark.parametrize('full', [0, 1])
def test_a_disk_that_shows_only_at_the_end_that_it_is_full(
    tmp_path, monkeypatch, full
):
    """As with delayed allocation, or over a network: writing is no proof."""
    write_pair(tmp_path, 1)
    synced, fsync = [], os.fsync

    def fails_once(descriptor):
        # Nothing is in its place before all of them are on the disk.
        assert numbers(tmp_path) == (1, 1)
        synced.append(os.fstat(descriptor).st_ino)
        if len(synced) == full + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', fails_once)
    with pytest.raises(UserError, match='cannot write to .*No space left'):
        write_pair(tmp_path, 2)
    assert len(set(synced)) == full + 1
    assert numbers(tmp_path) == (1, 1)
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)


def limited(work, size, report):
    """Run work where no file can get larger; its error as a text."""

    def child():
        soft, hard = size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        try:
            work()
        except UserError as error:
            os.write(report, str(error).encode())

    pid = forked(child)
    status = os.waitpid(pid, 0)[1]
    assert status == 0


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('size', [0, 1000, 40_000])
def test_disk_full_while_deploying(tmp_path, suffix, size):
    if suffix == '.safetensors':
        pytest.importorskip('safetensors')
    config = write_config(tmp_path, 'classifier')
    checkpoint = write_checkpoint(config, tmp_path / 'trained.pth')
    folder = tmp_path / 'outputs'
    folder.mkdir()
    (folder / f'a{suffix}').write_text('old')
    (folder / 'a.py').write_text('old')
    cfg = Config.fromfile(config)  # writes a copy of it
    read, report = os.pipe()
    limited(
        lambda: deploy(
            cfg,
            checkpoint,
            str(folder / f'a{suffix}'),
            image_size=(32, 24),
            overwrite=True,
        ),
        size,
        report,
    )
    os.close(report)
    with os.fdopen(read) as file:
        message = file.read()
    assert 'cannot write' in message and 'File too large' in message
    assert sorted(os.listdir(folder)) == sorted(['a.py', f'a{suffix}'])
    assert {p.read_text() for p in folder.iterdir()} == {'old'}
