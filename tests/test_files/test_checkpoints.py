"""Reading without running code; writing whole or not at all."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing
from mmdbb.files.checkpoints import (
    compare_with_torch,
    load_strictly,
    read_checkpoint,
)
from mmdbb.files.second_reader import read_by_torch
from mmdbb.files.sources import some

STATE = dict(weight=torch.ones(2, 3), count=torch.tensor(3))
ONES = dict(weight=torch.ones(2))


class Harmful:
    """Runs a command when it is unpickled by a careless reader."""

    def __reduce__(self):
        return (os.mkdir, ('harmed',))


def write(path, content):
    torch.save(content, path)
    return str(path)


# Reading


@pytest.mark.parametrize(
    'content',
    [
        STATE,
        dict(state_dict=STATE),
        dict(state_dict=STATE, meta=None, epoch=3),
        dict(state_dict={f'module.{k}': v for k, v in STATE.items()}),
    ],
)
def test_forms(tmp_path, content):
    found = read_checkpoint(write(tmp_path / 'a.pth', content))
    assert found['meta'] == {}
    assert found['state_dict'].keys() == STATE.keys()
    assert torch.equal(found['state_dict']['weight'], STATE['weight'])
    assert found.get('epoch') == (3 if 'epoch' in content else None)


def test_large_values_are_values(tmp_path):
    found = read_checkpoint(write(tmp_path / 'a.pth', LARGE))
    assert torch.equal(found['state_dict']['weight'], LARGE['weight'])


def test_meta_is_kept(tmp_path):
    content = dict(state_dict=STATE, meta=dict(seed=1))
    found = read_checkpoint(write(tmp_path / 'a.pth', content))
    assert found['meta'] == dict(seed=1)


def test_prefix_is_taken_only_from_all(tmp_path):
    state = {'module.a': torch.ones(1), 'b': torch.ones(1)}
    found = read_checkpoint(write(tmp_path / 'a.pth', state))
    assert list(found['state_dict']) == ['module.a', 'b']


def truncated(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


INT8 = torch.qint8
NAN = dict(STATE, weight=torch.tensor([[1.0, float('nan')]]))
# Finite, though their sum is not.
LARGE = dict(STATE, weight=torch.full((1, 2), 3e38))
BOTH = dict(STATE, weight=torch.tensor([[float('inf'), float('-inf')]]))
INF = {f'w{i}': torch.tensor([float('-inf')]) for i in range(5)}
BAD = {
    'missing': (None, 'checkpoint not found: '),
    'folder': (lambda p: p.mkdir(), 'checkpoint is a folder, not a file: '),
    'empty': (lambda p: p.write_bytes(b''), 'checkpoint is empty: '),
    'text': (
        lambda p: p.write_text('model = dict()\n' * 9),
        'a.pth is not a checkpoint, or is truncated: no pickle of tensors',
    ),
    'text that begins as a pickle does': (
        lambda p: p.write_text('hi, this is text'),
        'a.pth is not a checkpoint, or is truncated: no pickle of tensors',
    ),
    'truncated': (
        lambda p: (write(p, STATE), truncated(p)),
        'a.pth is not a checkpoint, or is truncated: ',
    ),
    'zip of something else': (
        lambda p: p.write_bytes(b'PK\x05\x06' + bytes(18)),
        'a.pth is not a checkpoint, or is truncated: ',
    ),
    'image': (
        lambda p: p.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(40)),
        'a.pth is not a checkpoint, or is truncated: no pickle',
    ),
    'list': (lambda p: write(p, [1, 2]), 'holds a list, not a checkpoint'),
    'tensor': (lambda p: write(p, torch.ones(1)), 'holds a Tensor, not a'),
    'no weights': (lambda p: write(p, {}), 'its state_dict is empty'),
    'state of nothing': (
        lambda p: write(p, dict(state_dict={})),
        'its state_dict is empty',
    ),
    'state of something else': (
        lambda p: write(p, dict(state_dict=dict(STATE, epoch=3))),
        "entry 'epoch' is no tensor",
    ),
    'name that is none': (
        lambda p: write(p, dict(state_dict={3: torch.ones(1)})),
        'a.pth is not a checkpoint: 3 is no name of an entry',
    ),
    'name of odd characters': (
        lambda p: write(p, {'a\nb': torch.tensor([float('nan')])}),
        r"not finite: 'a\\nb'",
    ),
    'quantized': (
        lambda p: write(
            p,
            dict(w=torch.quantize_per_tensor(STATE['weight'], 1, 0, INT8)),
        ),
        r'has entries that are quantized \(qint8\): w',
    ),
    'sparse': (
        lambda p: write(p, dict(w=STATE['weight'].to_sparse())),
        'has entries that are sparse: w',
    ),
    'complex': (
        lambda p: write(p, dict(w=STATE['weight'] * 1j)),
        'has entries that are of type complex64: w',
    ),
    'float8': (
        lambda p: write(p, dict(w=STATE['weight'].to(torch.float8_e5m2))),
        'has entries that are of type float8_e5m2: w',
    ),
    'no values': (
        lambda p: write(p, dict(w=STATE['weight'].to('meta'))),
        r'has entries that are without values \(meta\): w',
    ),
    'few bytes, many numbers': (
        lambda p: write(p, dict(w=torch.ones(1).expand(10**12))),
        r'entries that are larger than the file \(1e\+12 numbers\): w',
    ),
    'negative variance': (
        lambda p: write(p, {'bn.running_var': torch.tensor([1.0, -0.1])}),
        'a.pth has a negative variance: bn.running_var',
    ),
    'differences': (
        lambda p: write(p, dict(model_delta=STATE)),
        r'differences to other weights \(model_delta\), not weights',
    ),
    'nan': (lambda p: write(p, NAN), 'values that are not finite: weight'),
    'both infinities': (
        lambda p: write(p, BOTH),
        'values that are not finite: weight',
    ),
    'inf': (
        lambda p: write(p, INF),
        'not finite: w0, w1, w2 and 2 more',
    ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_files(tmp_path, case):
    make, message = BAD[case]
    path = tmp_path / 'a.pth'
    if make is not None:
        make(path)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(str(path))
    assert '\n' not in str(error.value)
    assert 'a.pth' in str(error.value)


@pytest.mark.parametrize('legacy', [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save(
        dict(state_dict=STATE, meta=Harmful()),
        'a.pth',
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(UserError, match='mkdir, which is not allowed in a'):
        read_checkpoint('a.pth')
    assert not os.path.exists('harmed')


def test_a_bare_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pth').write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match='a.pth'):
        read_checkpoint('a.pth')
    assert not os.path.exists('harmed')


# Loading


def test_load_strictly():
    source, model = nn.Linear(2, 3), nn.Linear(2, 3)
    load_strictly(model, source.state_dict(), 'a.pth')
    assert torch.equal(model.weight, source.weight)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda s: s.pop('bias'), 'missing: bias'),
        (
            lambda s: s.update(bias=torch.ones(3, dtype=torch.int8)),
            r'of another type: bias \(int8 in the file, float32 in the netwo',
        ),
        (lambda s: s.update(extra=torch.ones(1)), 'unexpected: extra'),
        (
            lambda s: s.update(bias=torch.ones(4)),
            r'of another shape: bias \(\(4,\) in the file, \(3,\) in the net',
        ),
    ],
)
def test_what_does_not_fit(change, message):
    model = nn.Linear(2, 3)
    before = model.weight.detach().clone()
    state = nn.Linear(2, 3).state_dict()
    change(state)
    with pytest.raises(UserError, match=f'a.pth does not fit .*{message}'):
        load_strictly(model, state, 'a.pth')
    assert torch.equal(model.weight, before)


def test_merged_files_keep_their_floats_and_get_the_models_integers():
    model = nn.BatchNorm2d(3)
    state = {
        name: value.half() if value.is_floating_point() else value.int() + 7
        for name, value in model.state_dict().items()
    }
    load_strictly(model, state, 'a.pth', keep_dtype=True)
    assert model.running_var.dtype == model.weight.dtype == torch.float16
    # What counts batches counts on: an int32 would end at two billion.
    assert model.num_batches_tracked.dtype == torch.int64
    assert model.num_batches_tracked == 7
    # Without it the model's own dtypes stay.
    other = nn.BatchNorm2d(3)
    load_strictly(other, state, 'a.pth')
    assert other.weight.dtype == torch.float32
    assert other.num_batches_tracked.dtype == torch.int64
    assert other.num_batches_tracked == 7


def test_some():
    assert some(['a', 'b', 'c']) == 'a, b, c'
    assert some(list('abcde'), 2) == 'a, b and 3 more'


# Writing


def fill(drafts):
    for draft in drafts:
        with open(draft, 'w') as file:
            file.write('new')


def test_all(tmp_path):
    outputs = [str(tmp_path / 'deep' / name) for name in ('a.pth', 'a.py')]
    with all_or_nothing(*outputs) as drafts:
        assert [os.path.basename(d) for d in drafts] == ['a.pth', 'a.py']
        fill(drafts)
        assert not any(os.path.exists(o) for o in outputs)
    assert sorted(os.listdir(tmp_path / 'deep')) == ['a.pth', 'a.py']


def test_nothing_after_an_error(tmp_path):
    with (
        pytest.raises(KeyError),
        all_or_nothing(str(tmp_path / 'a')) as drafts,
    ):
        fill(drafts)
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('which', [0, 1])
def test_existing_output_is_kept(tmp_path, which):
    outputs = [tmp_path / 'a.pth', tmp_path / 'a.py']
    outputs[which].write_text('old')
    with (
        pytest.raises(UserError, match='output exists: .*--force'),
        all_or_nothing(*map(str, outputs)),
    ):
        raise AssertionError
    assert outputs[which].read_text() == 'old'
    assert len(os.listdir(tmp_path)) == 1


def test_broken_link_counts_as_existing(tmp_path):
    (tmp_path / 'a').symlink_to(tmp_path / 'nowhere')
    with (
        pytest.raises(UserError, match='output exists'),
        all_or_nothing(str(tmp_path / 'a')),
    ):
        raise AssertionError


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / 'a'
    with (
        pytest.raises(UserError, match='output exists'),
        all_or_nothing(str(path)) as drafts,
    ):
        fill(drafts)
        path.write_text('of another process')
    assert path.read_text() == 'of another process'
    assert os.listdir(tmp_path) == ['a']


def test_second_output_that_appears_takes_the_first_back(tmp_path):
    first, second = tmp_path / 'a.pth', tmp_path / 'a.py'
    with (
        pytest.raises(UserError, match='output exists: .*a.py'),
        all_or_nothing(str(first), str(second)) as drafts,
    ):
        fill(drafts)
        second.write_text('of another process')
    assert os.listdir(tmp_path) == ['a.py']


def test_overwrite(tmp_path):
    path = tmp_path / 'a'
    path.write_text('old')
    with all_or_nothing(str(path), overwrite=True) as drafts:
        fill(drafts)
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'


def test_output_that_is_a_folder(tmp_path):
    for overwrite in (True, False):
        with (
            pytest.raises(UserError, match='output is a folder'),
            all_or_nothing(str(tmp_path), overwrite=overwrite),
        ):
            raise AssertionError


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with (
        pytest.raises(UserError, match='cannot write to .*file'),
        all_or_nothing(str(tmp_path / 'file' / 'a')),
    ):
        raise AssertionError


def test_failure_leaves_no_new_folder(tmp_path):
    with (
        pytest.raises(KeyError),
        all_or_nothing(str(tmp_path / 'new' / 'deep' / 'a')) as drafts,
    ):
        fill(drafts)
        raise KeyError
    assert os.listdir(tmp_path) == []


# Read by torch


@pytest.mark.parametrize('form', ['stored', 'deflated', 'legacy'])
def test_torch_reads_the_same(tmp_path, form):
    path = tmp_path / 'a.pth'
    state = dict(STATE, expanded=torch.ones(1).expand(3))
    content = dict(state_dict=ONES, ema_state_dict=state)
    torch.save(content, path, _use_new_zipfile_serialization=form != 'legacy')
    if form == 'deflated':
        with zipfile.ZipFile(path) as archive:
            members = {i: archive.read(i) for i in archive.namelist()}
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            for name, member in members.items():
                archive.writestr(name, member)
    for ema in (True, False):
        found = read_checkpoint(str(path), ema)['state_dict']
        compare_with_torch(found, str(path), ema)


@pytest.mark.parametrize(
    'change',
    [
        dict(weight=STATE['weight'] + 1),
        dict(weight=STATE['weight'].double()),
        dict(weight=STATE['weight'].T),
        dict(more=torch.ones(1)),
        None,
    ],
)
def test_torch_reads_another_thing(tmp_path, change):
    path = write(tmp_path / 'a.pth', STATE)
    state = dict(STATE, **change) if change else dict(count=STATE['count'])
    with pytest.raises(UserError, match='differ in (weight|more); nothing'):
        compare_with_torch(state, path)


def test_torch_reads_what_mmengine_notes(tmp_path):
    """Beside the weights of an ordinary training, too."""
    content = dict(state_dict=STATE, message_hub=HistoryBuffer([1.0], [1]))
    path = write(tmp_path / 'a.pth', content)
    compare_with_torch(read_checkpoint(path)['state_dict'], path)
    with pytest.raises(UserError, match='differ in weight'):
        compare_with_torch(dict(STATE, weight=STATE['weight'] + 1), path)


def test_the_second_reader_runs_nothing(tmp_path):
    """Though only files that the first one takes are given to it."""
    ran = tmp_path / 'ran'
    content = dict(state_dict=STATE, meta=Touch(ran), array=np.arange(3.0))
    path = write(tmp_path / 'a.pth', content)
    found = read_by_torch(path)
    assert not ran.exists()
    assert vars(found['meta']) == {}
    assert torch.equal(found['state_dict']['weight'], STATE['weight'])
    torch.load(path, weights_only=False)
    assert ran.exists()  # it would


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_what_torch_cannot_read_is_said(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'not a checkpoint')
    with pytest.raises(UserError, match='read by mmdbb, but not by torch'):
        compare_with_torch(STATE, str(path))
