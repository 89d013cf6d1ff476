"""mmengine's own checkpoints are read as data; anything else is refused."""

import collections
import itertools
import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import mmengine.optim
import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader, Runner

from mmdbb.errors import UserError
from mmdbb.files import sources
from mmdbb.files.checkpoints import read_checkpoint, read_content
from mmdbb.files.sources import check_values
from mmdbb.files.values import _MAKERS, DTYPES, NUMBERS, STATISTICS
from mmdbb.mm.host_loading import strict_loading

pytestmark = pytest.mark.usefixtures('quiet')


class Line(BaseModel):
    """A straight line, fitted."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode='tensor'):
        out = self.line(inputs)
        if mode == 'loss':
            return dict(loss=(out - 2 * inputs).square().mean())
        return [out]


class Distance(BaseMetric):
    """A metric that numpy computes, so that `best_score` is numpy's."""

    def process(self, data_batch, data_samples):
        self.results.append(float(data_samples[0].abs().mean()))

    def compute_metrics(self, results):
        return dict(distance=np.mean(results))


def runner(work_dir, epochs, **kwargs):
    data = dict(
        batch_size=4,
        dataset=[dict(inputs=torch.tensor([i / 8])) for i in range(8)],
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    return Runner(
        Line(),
        str(work_dir),
        train_dataloader=data,
        val_dataloader=data,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg=dict(),
        val_evaluator=[Distance()],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        # Its state holds a Counter.
        param_scheduler=dict(type='MultiStepLR', milestones=[1, 3]),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(
                type='CheckpointHook', save_best='distance', rule='less'
            ),
        ),
        custom_hooks=[dict(type='EMAHook')],
        default_scope='mmengine',
        experiment_name=f'{work_dir.name}-{epochs}-{len(kwargs)}',
        **kwargs,
    )


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp('run')
    runner(path, 2).train()
    return path


def test_runner_checkpoint_loads(work_dir):
    checkpoint = read_content(str(work_dir / 'epoch_2.pth'))
    scalars = checkpoint['message_hub']['log_scalars']
    loss = scalars['train/loss']
    assert type(loss) is HistoryBuffer
    assert loss.data[0].shape == (4,)
    assert loss.statistics('mean') == pytest.approx(loss.data[0].mean())
    runtime = checkpoint['message_hub']['runtime_info']
    assert runtime['best_score'] > 0


def test_all_that_torch_reads_is_the_same(work_dir):
    path = str(work_dir / 'epoch_2.pth')
    theirs = torch.load(path, weights_only=False)
    assert same(read_content(path), theirs)


def same(found, expected):
    if isinstance(expected, HistoryBuffer):
        assert vars(found).keys() >= {'_log_history', '_count_history'}
        return same(found.data, expected.data)
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        versions = [getattr(d, '_metadata', None) for d in (found, expected)]
        assert versions[0] == versions[1]
        return all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        return all(map(same, found, expected))
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()
        return torch.equal(found, expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        return np.array_equal(found, expected)
    return found == expected


def test_torch_itself_stays_as_it_is(work_dir):
    # Of the process, only mmengine's readers are other ones.
    path = str(work_dir / 'epoch_2.pth')
    code = f"""
import mmdbb, torch
from mmengine.runner import CheckpointLoader
print(sorted(CheckpointLoader.load_checkpoint({path!r})))
torch.load({path!r}, weights_only=True)
"""
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert "'message_hub', 'meta'" in run.stdout
    assert run.returncode and 'UnpicklingError' in run.stderr
    assert 'getattr' in run.stderr or 'HistoryBuffer' in run.stderr


def test_mmengine_reads_by_this_reader(tmp_path):
    torch.save(dict(state_dict=dict(w=torch.ones(2))), tmp_path / 'a.pth')
    content = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), 'cpu')
    assert torch.equal(content['state_dict']['w'], torch.ones(2))
    on_meta = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), 'meta')
    assert on_meta['state_dict']['w'].is_meta


@pytest.mark.parametrize('scheme', ['http', 'torchvision'])
def test_what_is_downloaded_is_read_as_data(tmp_path, monkeypatch, scheme):
    from mmengine.runner import checkpoint

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    whole, harmful = tmp_path / 'whole.pth', tmp_path / 'harmful.pth'
    torch.save(dict(w=torch.ones(2)), whole)
    saved(harmful, calling(os.mkdir, str(tmp_path / 'harmed')))
    names = {'whole': whole.as_uri(), 'harmful': harmful.as_uri()}
    monkeypatch.setattr(checkpoint, 'get_torchvision_models', lambda: names)

    def load(name):
        if scheme == 'http':
            return checkpoint.load_from_http(names[name], 'cpu')
        return CheckpointLoader.load_checkpoint(f'torchvision://{name}', 'cpu')

    assert torch.equal(load('whole')['w'], torch.ones(2))
    with pytest.raises(UserError, match='mkdir, which is not allowed'):
        load('harmful')
    assert not (tmp_path / 'harmed').exists()


@pytest.mark.parametrize(
    'content, message',
    [
        ([1, 2], 'holds a list, not a checkpoint'),
        ({3: torch.ones(2)}, 'its keys are no names'),
        (dict(state_dict=[1]), 'its state_dict is a list'),
        (dict(state_dict={3: torch.ones(2)}), '3 is no name of an entry'),
        (dict(state_dict=dict(w=torch.tensor([np.nan]))), 'not finite: w'),
        (dict(w=torch.tensor([np.nan])), 'not finite: w'),
        (dict(model=dict(w=3)), "entry 'w' is no tensor"),
    ],
)
def test_mmengine_gets_no_weights_that_are_none(tmp_path, content, message):
    torch.save(content, tmp_path / 'a.pth')
    with (
        strict_loading(),  # as in each of mmdbb's own tools
        pytest.raises(UserError, match=f'a.pth .*{message}'),
    ):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))


def others():
    weights = dict(w=torch.ones(3, 4), n=torch.tensor(3))
    complex_ = torch.randn(3, dtype=torch.complex64)
    states = {
        'a mask': dict(mask=torch.full((3, 3), float('-inf')).triu(1)),
        'no number': dict(w=torch.full((2,), float('nan'))),
        'a state of its own': {'w': torch.ones(2), '_extra_state': dict(a=1)},
        'nothing': dict(w=torch.ones(2), none=None),
        'complex': dict(w=complex_),
        'conjugated': dict(w=complex_.conj()),
        'negated': dict(w=complex_.conj().imag),
        'float8': dict(w=torch.randn(3).to(torch.float8_e4m3fn)),
        'negative variance': {'running_var': -torch.ones(2)},
    }
    contents = {name: dict(state_dict=s) for name, s in states.items()}
    contents.update(
        {
            f'{name}, bare': state
            for name, state in states.items()
            if name != 'nothing'
        }
    )
    for name, more in {
        'a model by name': dict(model='resnet50'),
        'a model by config': dict(model=dict(type='ResNet')),
        'a tuple as a key': dict(x={(1, 2): 3, (None, 'a'): 4}),
        'bytes as a key': dict(x={b'a': 1}),
        'a large key': dict(x={2**70: 1}),
        'a device': dict(x=torch.device('cuda', 1)),
    }.items():
        contents[name] = dict(state_dict=weights, **more)
    return contents


@pytest.mark.parametrize('case', others())
def test_mmengine_gets_what_torch_would_give_it(tmp_path, case):
    path = str(tmp_path / 'a.pth')
    torch.save(others()[case], path)
    try:
        expected = torch.load(path, weights_only=True)
    except pickle.UnpicklingError:  # an older torch
        expected = torch.load(path, weights_only=False)
    found = CheckpointLoader.load_checkpoint(path, 'cpu')
    assert found.keys() == expected.keys()
    for key, value in found.get('state_dict', found).items():
        theirs = expected.get('state_dict', expected)[key]
        assert type(value) is type(theirs)
        if isinstance(theirs, torch.Tensor):
            assert value.dtype is theirs.dtype
            kinds = value.resolve_conj(), theirs.resolve_conj()
            ours, theirs = (v.resolve_neg().reshape(-1) for v in kinds)
            assert torch.equal(
                ours.view(torch.uint8), theirs.view(torch.uint8)
            )
        else:
            assert value == theirs
    for key in ('x', 'model'):
        assert found.get(key) == expected.get(key)


@pytest.mark.parametrize('content', [dict(state_dict=None), dict()])
def test_mmengine_gets_no_tensor_that_was_not_read(tmp_path, content):
    state = dict(w=torch.eye(3).to_sparse())
    content = dict(content, state_dict=state) if content else state
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='entries that are sparse: w'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), 'cpu')


@pytest.mark.parametrize(
    'place', [{'cuda:0': 'cpu'}, lambda storage, where: storage, None, 'meta']
)
def test_places_of_all_kinds(tmp_path, place):
    weight = torch.nn.Parameter(torch.ones(2))
    content = dict(
        state_dict=dict(a=weight, b=weight),
        size=torch.Size([1, 2]),
        all=[(weight,)],
        quantized=torch.quantize_per_tensor(weight, 1, 0, torch.qint8),
    )
    torch.save(content, tmp_path / 'a.pth')
    path = str(tmp_path / 'a.pth')
    found = CheckpointLoader.load_checkpoint(path, place)
    assert found['size'] == (1, 2) and found['state_dict']['a'].is_leaf
    device = 'meta' if place == 'meta' else 'cpu'
    assert found['all'][0][0].device.type == device
    assert found['state_dict']['a'] is found['state_dict']['b']
    assert type(found['state_dict']['a']) is torch.nn.Parameter


def test_a_missing_file_is_what_python_calls_it(tmp_path):
    for error in (UserError, FileNotFoundError):
        with pytest.raises(error, match='checkpoint not found: .*a.pth'):
            CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))


def test_a_file_without_sums(tmp_path):
    path = str(tmp_path / 'a.pth')
    torch.save(dict(state_dict=dict(w=torch.ones(2))), tmp_path / 'b.pth')
    with zipfile.ZipFile(tmp_path / 'b.pth') as archive:
        infos = archive.infolist()
        content = {info.filename: archive.read(info) for info in infos}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, member in content.items():
            archive.writestr(name, member)
        for info in archive.infolist():
            # What set_crc32_options(False) leaves.
            info.CRC = 0
    with pytest.warns(UserWarning, match='a.pth was written without checksum'):
        found = read_content(path)
    assert torch.equal(found['state_dict']['w'], torch.ones(2))
    with zipfile.ZipFile(path, 'w') as archive:
        for name, member in content.items():
            archive.writestr(name, member)
        archive.getinfo('b/data.pkl').CRC = 0
    with pytest.raises(UserError, match='a.pth .*CRC'):
        read_content(path)


def test_resume_continues_the_history(work_dir):
    resumed = runner(
        work_dir, 3, resume=True, load_from=str(work_dir / 'epoch_2.pth')
    )
    resumed.train()
    assert resumed.epoch == 3
    loss = resumed.message_hub.get_scalar('train/loss')
    assert len(loss.data[0]) == 6  # 4 iterations before, 2 after


@pytest.mark.parametrize('name', STATISTICS)
def test_statistics_resolve_to_themselves(tmp_path, name):
    path = tmp_path / 'statistics.pth'
    torch.save(dict(method=getattr(HistoryBuffer, name)), path)
    method = read_content(str(path))['method']
    assert method is getattr(HistoryBuffer, name)


def test_statistics_are_those_of_mmengine():
    buffer = HistoryBuffer()
    own = {
        name
        for name, method in buffer._statistics_methods.items()
        if method.__module__ == HistoryBuffer.__module__
    }
    assert own == set(STATISTICS)


def saved(path, pickled):
    """Write a torch file whose pickle is `pickled`, byte by byte."""
    ordinary = path.with_suffix('.ordinary')
    torch.save({}, ordinary)
    with zipfile.ZipFile(ordinary) as old, zipfile.ZipFile(path, 'w') as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(
                name, pickled if name.endswith('data.pkl') else content
            )
    return str(path)


class Call:
    """Pickled as a call of a function, and a state for its result."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments = function, arguments
        self.state = state

    def __reduce__(self):
        return self.function, self.arguments, self.state


def calling(function, *arguments, state=None):
    """Return a protocol-2 pickle that calls `function` on `arguments`."""
    call = Call(function, *arguments, state=state)
    return pickle.dumps(dict(loot=call), protocol=2)


def refused(path, pickled, match='a.pth'):
    """Whoever reads it gets one line, and no value."""
    path = saved(path, pickled)
    with pytest.raises(UserError, match=match) as error:
        read_content(path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'attribute',
    [
        '__init__',
        '__globals__',
        'update',
        'register_statistics',
        '_statistics_methods',
        '__class__',
    ],
)
def test_other_attributes_of_the_buffer_are_refused(tmp_path, attribute):
    pickled = calling(getattr, HistoryBuffer, attribute)
    refused(tmp_path / 'attribute.pth', pickled, attribute)


@pytest.mark.parametrize(
    'methods',
    [dict(mean=HistoryBuffer.max), dict(mean=3), dict(more=HistoryBuffer.max)],
)
def test_a_file_cannot_change_the_statistics(tmp_path, methods):
    # mmengine would take them over, for all buffers of the process.
    state = dict(HistoryBuffer([1.0], [1]).__getstate__())
    state['statistics_methods'] = methods
    before = dict(HistoryBuffer._statistics_methods)
    pickled = calling(HistoryBuffer, state=state)
    refused(tmp_path / 'statistics.pth', pickled, 'mean|more')
    assert HistoryBuffer._statistics_methods == before


@pytest.mark.parametrize(
    'owner', [np.ndarray, np.dtype, torch.Tensor, dict(), 'text']
)
def test_attributes_of_others_are_refused(tmp_path, owner):
    refused(tmp_path / 'a.pth', calling(getattr, owner, 'mean'))


def test_chained_getattr_is_refused(tmp_path):
    # getattr(getattr(HistoryBuffer, 'mean'), '__globals__')
    pickled = (
        b'\x80\x02c__builtin__\ngetattr\n'
        b'c__builtin__\ngetattr\n'
        b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
        b'X\x04\x00\x00\x00mean\x86R'
        b'X\x0b\x00\x00\x00__globals__\x86R.'
    )
    # The unsafe loader does follow it: the pickle is what it claims to be.
    assert '__builtins__' in pickle.loads(pickled)
    refused(tmp_path / 'chain.pth', pickled, '__globals__')


def test_commands_are_refused_and_not_run(tmp_path):
    trace = tmp_path / 'trace'
    for number, function in enumerate([os.system, eval, exec]):
        argument = (
            f'touch {trace}'
            if function is os.system
            else f'open({str(trace)!r}, "w")'
        )
        pickled = calling(function, argument)
        refused(tmp_path / f'command{number}.pth', pickled, 'not allowed in')
        assert not trace.exists()
    # The same pickle does run where nothing guards it.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pickle.loads(calling(os.system, f'touch {trace}'))
    assert trace.exists()


def test_numpy_1_names_load(tmp_path):
    array = np.arange(3.0)
    pickled = pickle.dumps(dict(array=array), protocol=2)
    for old, new in [
        (b'numpy._core.multiarray', b'numpy.core.multiarray'),
        (b'numpy.core.multiarray', b'numpy._core.multiarray'),
    ]:
        path = saved(tmp_path / 'array.pth', pickled.replace(old, new))
        assert (read_content(path)['array'] == array).all()


@pytest.mark.parametrize('code', NUMBERS)
def test_numbers_of_numpy(tmp_path, code):
    for order in '<>':
        array = np.array([[1, 0, 1], [0, 1, 1]]).astype(order + code)
        for content in (array, array.T, array[:, :0], array[0, 0]):
            torch.save(dict(x=content), tmp_path / 'a.pth')
            found = read_content(str(tmp_path / 'a.pth'))['x']
            assert np.array_equal(found, content)
            assert found.dtype == content.dtype.newbyteorder('=')


OBJECTS = np.dtype('O')
FORGED = bytearray(b'A' * 8)
DTYPE = Call(
    np.dtype, 'f8', False, True, state=(3, '<', *[None] * 3, -1, -1, 0)
)
EMPTY = (np.empty(0).__reduce__()[0], np.ndarray, (0,), b'b')
# What a file may name, asked for in another form than its own.
HOSTILE = {
    # The eight bytes would be taken as a pointer.
    'pointer': (np.ndarray, (1,), 'O', FORGED),
    'pointer in a set': (set, [Call(np.ndarray, (1,), 'O', FORGED)]),
    'memory as it was': (np.ndarray, (10**6,), 'f8'),
    'objects': (np.dtype, 'O'),
    'a type by itself': (np.dtype, 'f8', False, True),
    'another class of array': (EMPTY[0], np.memmap, (0,), b'b'),
    'an array of another size': (EMPTY[0], np.ndarray, (10**6,), b'b'),
    'a number of no type': (np.float64(0).__reduce__()[0], OBJECTS, b'A' * 8),
    'a number of another size': (np.float64(0).__reduce__()[0], DTYPE, b'A'),
    'a number of fields': (
        np.float64(0).__reduce__()[0],
        Call(
            np.dtype,
            'f8',
            False,
            True,
            state=(3, '<', None, ('a',), {'a': (OBJECTS, 0)}, -1, -1, 0),
        ),
        b'A' * 8,
    ),
    'a tensor of no storage': (
        torch._utils._rebuild_tensor_v2,
        3,
        0,
        (1,),
        (1,),
        False,
        {},
    ),
    'an old tensor of no storage': (
        torch._utils._rebuild_tensor,
        torch.float32,
        0,
        (1,),
        (1,),
    ),
    'a third tensor of no storage': (
        torch._utils._rebuild_tensor_v3,
        'x',
        0,
        (1,),
        (1,),
        False,
        {},
        torch.float32,
    ),
    'uninitialised numbers': (torch.FloatTensor, 10**8),
    'an empty tensor': (torch.Tensor, 10**8),
    'a wrapper': (
        torch._utils._rebuild_wrapper_subclass,
        torch.Tensor,
        torch.float32,
        (10**8,),
        (1,),
        0,
        torch.strided,
        'cpu',
        False,
    ),
    'another class of tensor': (
        torch._tensor._rebuild_from_type_v2,
        torch._utils._rebuild_tensor_v2,
        HistoryBuffer,
        (),
        {},
    ),
    'a function instead of a rebuilder': (
        torch._tensor._rebuild_from_type_v2,
        os.system,
        torch.Tensor,
        ('true',),
        {},
    ),
    'a parameter of text': (torch._utils._rebuild_parameter, 'abc', True, {}),
    'a parameter with a state of text': (
        torch._utils._rebuild_parameter_with_state,
        'abc',
        True,
        {},
        {},
    ),
    'a parameter of nothing': (torch.nn.Parameter,),
    'sizes of text': (torch.Size, 'abc'),
    'sizes below zero': (torch.Size, (-1,)),
    'a device of a number': (torch.device, 3.5),
    'a dict of numbers': (collections.OrderedDict, 3),
    'a dict with keys that no dict has': (collections.OrderedDict, [([1], 2)]),
    'a counter of text': (collections.Counter, 'abc'),
    'a set of sets': (set, [Call(set, [1])]),
    'a set of a number': (set, 3),
    'a complex of text': (complex, 'x', 'y'),
    'many bytes': (bytearray, 10**10),
    'many zeros': (bytes, 10**10),
    'bytes of bytes': (pickle.codecs.encode, 3, 'latin1'),
    'another encoding': (pickle.codecs.encode, 'abc', 'rot13'),
    'a buffer with arguments': (HistoryBuffer, [1.0], [1]),
    'a buffer without a state': (HistoryBuffer,),
    'a method of a number': (getattr, 3, 'mean'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_arguments(tmp_path, case):
    refused(tmp_path / 'a.pth', calling(*HOSTILE[case]), 'a.pth')


def test_every_entry_of_the_list_is_tried():
    tried = {f'{f.__module__}.{f.__qualname__}' for f, *_ in HOSTILE.values()}
    renamed = {'numpy.core.multiarray.': 'numpy._core.multiarray.'}
    for old, new in renamed.items():
        tried = {name.replace(old, new) for name in tried}
    assert set(_MAKERS) <= tried, set(_MAKERS) - tried


@pytest.mark.parametrize(
    'state',
    [
        None,
        (1, (1,), DTYPE, False, b'A' * 7),
        (1, (2**62, 4), DTYPE, False, b'A' * 8),
        (1, (-1,), DTYPE, False, b''),
        (
            1,
            (1,),
            Call(
                np.dtype,
                'O',
                False,
                True,
                state=(3, '|', *[None] * 3, -1, -1, 63),
            ),
            False,
            b'A' * 8,
        ),
        (
            1,
            (1,),
            Call(
                np.dtype,
                'O8',
                False,
                True,
                state=(3, '|', *[None] * 3, -1, -1, 63),
            ),
            False,
            b'A' * 8,
        ),
        (
            1,
            (1,),
            Call(
                np.dtype,
                'V8',
                False,
                True,
                state=(3, '|', None, ('a',), {'a': (OBJECTS, 0)}, 8, 1, 16),
            ),
            False,
            b'A' * 8,
        ),
        (1, (1,), 'f8', False, b'A' * 8),
        (2, (1,), DTYPE, False, b'A' * 8),
        (1, (1,), DTYPE, [], b'A' * 8),
        (1, (1,), DTYPE, False, [1.0]),
    ],
)
def test_hostile_states_of_arrays(tmp_path, state):
    pickled = calling(*EMPTY, state=state)
    refused(tmp_path / 'a.pth', pickled, 'a.pth')


@pytest.mark.parametrize(
    'size, stride, offset',
    [
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2, 2), (3, 1), 1),
        ((1,), (1,), 2**62),
        ((1,), (1,), -1),
        ((-1,), (1,), 0),
        ((2,), (-1,), 1),
        ((2**40, 2**40), (0, 0), 0),
        ((2,), (1, 1), 0),
        ((1,) * 70, (1,) * 70, 0),
        (None, (1,), 0),
        ((1.0,), (1,), 0),
    ],
)
def test_tensors_outside_of_their_storage(tmp_path, size, stride, offset):
    class Weights(pickle.Pickler):
        def persistent_id(self, value):
            if value == 'here':
                return 'storage', torch.FloatStorage, '0', 'cpu', 4

    import io

    file = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    Weights(file, 2).dump(
        dict(w=Call(rebuild, 'here', offset, size, stride, False, None))
    )
    torch.save(dict(w=torch.ones(4)), tmp_path / 'whole.pth')
    with (
        zipfile.ZipFile(tmp_path / 'whole.pth') as old,
        zipfile.ZipFile(tmp_path / 'a.pth', 'w') as new,
    ):
        for name in old.namelist():
            pickled = name.endswith('data.pkl')
            new.writestr(name, file.getvalue() if pickled else old.read(name))
    with pytest.raises(UserError, match='a.pth'):
        read_content(str(tmp_path / 'a.pth'))


def test_containers_in_themselves(tmp_path):
    inner = {}
    inner['self'] = inner
    refused(tmp_path / 'a.pth', pickle.dumps(inner, 2), 'in themselves')
    deep = b'\x80\x02' + 5000 * b']' + 4999 * b'a' + b'.'
    refused(tmp_path / 'a.pth', deep, 'in themselves')


def test_few_bytes_cannot_become_many_values(tmp_path):
    many = ['x']
    for _ in range(30):
        many = [many, many]  # 2 ** 30 lists where each reference is followed
    refused(tmp_path / 'a.pth', pickle.dumps(many, 2), 'too much for its size')
    refused(
        tmp_path / 'b.pth',
        pickle.dumps([()] * 3_000_000, 2),
        'steps|too much for its size',
    )
    text = pickle.dumps([Call(pickle.codecs.encode, 'x' * 10**6, 'latin1')], 2)
    many = b'\x80\x02](' + 1000 * (text[4:-2]) + b'e.'
    with zipfile.ZipFile(tmp_path / 'c.pth', 'w', zipfile.ZIP_DEFLATED) as new:
        new.writestr('archive/data.pkl', many)
    with pytest.raises(UserError, match='too much for its size'):
        read_content(str(tmp_path / 'c.pth'))


def test_keys_that_would_fall_in_one_place(tmp_path):
    many = {i * (2**61 - 1): i for i in range(1000)}
    refused(tmp_path / 'a.pth', pickle.dumps(many, 2), 'a key of type int')


@pytest.mark.parametrize('kind', [torch.clone, torch.nn.Parameter])
@pytest.mark.parametrize('legacy', [True, False])
def test_tensors_with_attributes_of_python(tmp_path, kind, legacy):
    state = {f'w{i}': kind(torch.full((3,), float(i))) for i in range(50)}
    for value in state.values():
        value.note = 'averaged'
    state['tied'] = state['w7']
    torch.save(
        dict(state_dict=state),
        tmp_path / 'a.pth',
        _use_new_zipfile_serialization=not legacy,
    )
    found = read_content(str(tmp_path / 'a.pth'))['state_dict']
    assert same(found, state)
    assert found['tied'] is found['w7']


def scheduled(kind, optimizer):
    arguments = dict(
        CosineAnnealing=dict(T_max=5),
        CosineRestart=dict(periods=[2, 3], restart_weights=[1, 0.5]),
        Exponential=dict(gamma=0.9),
        MultiStep=dict(milestones=[1]),
        OneCycle=dict(eta_max=1, total_steps=9),
        ReduceOnPlateau=dict(monitor='loss', rule='less'),
        Step=dict(step_size=1),
    )
    name = kind.__name__.replace('LR', '').replace('Momentum', '')
    more = dict(eta_min=0) if name == 'CosineRestart' else {}
    return kind(optimizer, **arguments.get(name, {}), **more)


@pytest.mark.parametrize(
    'name',
    [
        name
        for name in dir(mmengine.optim)
        if name.endswith(('LR', 'Momentum'))
    ],
)
def test_schedulers_of_mmengine(tmp_path, name):
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    state = scheduled(getattr(mmengine.optim, name), optimizer).state_dict()
    torch.save(dict(param_schedulers=[state]), tmp_path / 'a.pth')
    (found,) = read_content(str(tmp_path / 'a.pth'))['param_schedulers']
    assert same(found, state)


@pytest.mark.parametrize('strategy', ['cos', 'linear'])
def test_functions_of_one_cycle_are_mmengines_own(tmp_path, strategy):
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    one_cycle = mmengine.optim.OneCycleLR(
        optimizer, eta_max=1, total_steps=9, anneal_strategy=strategy
    )
    state = one_cycle.state_dict()
    torch.save(state, tmp_path / 'a.pth')
    found = read_content(str(tmp_path / 'a.pth'))['anneal_func']
    assert found is getattr(OneCycleParamScheduler, f'_annealing_{strategy}')


@pytest.mark.parametrize('name', ['__init__', 'step', 'build_iter_from_epoch'])
def test_other_functions_of_one_cycle_are_refused(tmp_path, name):
    pickled = calling(getattr, OneCycleParamScheduler, name)
    refused(tmp_path / 'a.pth', pickled, name)


def test_advice_is_one_that_can_be_followed(tmp_path):
    path = saved(tmp_path / 'a.pth', calling(os.mkdir, 'x'))
    with pytest.raises(UserError, match='save it again without that entry'):
        CheckpointLoader.load_checkpoint(path)
    with pytest.raises(UserError, match='--unsafe-load reads it'):
        read_content(path, unsafe=False)


def rewritten(path, *changes):
    """Replace bytes of the same length in the pickle of a torch file."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            for before, after in changes:
                if name.endswith('data.pkl'):
                    assert before in content
                    content = content.replace(before, after)
            new.writestr(name, content)
    return str(path)


@pytest.mark.parametrize(
    'name', ['quint8', 'qint8', 'qint32', 'bits8', 'bits2x4', 'int4', 'uint3']
)
def test_numbers_in_which_nothing_is_computed(tmp_path, name):
    if not hasattr(torch, name):
        pytest.skip(f'this torch has no {name}')
    state = dict(w=torch.arange(4).to(torch.float8_e5m2))
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    path = rewritten(
        tmp_path / 'a.pth',
        (b'ctorch\nfloat8_e5m2\n', f'ctorch\n{name}\n'.encode()),
    )
    for read in (read_checkpoint, CheckpointLoader.load_checkpoint):
        with pytest.raises(UserError, match=f'that are of type {name}: w'):
            read(path)


@pytest.mark.parametrize('name', sorted(map(str, DTYPES)))
def test_numbers_of_all_types_are_the_same(tmp_path, name):
    dtype = getattr(torch, name.partition('.')[2])
    value = torch.arange(32, dtype=torch.uint8) % 2
    torch.save(dict(w=value.view(dtype)), tmp_path / 'a.pth')
    found = read_content(str(tmp_path / 'a.pth'))['w']
    assert found.dtype is dtype
    assert torch.equal(found.view(torch.uint8), value)


def test_only_versions_of_layers_are_kept(tmp_path):
    state = torch.nn.BatchNorm2d(2).state_dict()
    state._metadata.update({'a': dict(version='2'), 3: dict(version=1)})
    state._metadata.update(b=dict(version=2, more=[1]), c=dict())
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    found = read_content(str(tmp_path / 'a.pth'))['state_dict']
    assert found._metadata == {'': dict(version=2), 'b': dict(version=2)}


@pytest.mark.parametrize('read', [read_checkpoint, read_content])
def test_many_names_of_one_tensor(tmp_path, read):
    large = torch.randn(1 << 20)
    state = {f'w{i}.running_var': large for i in range(20_000)}
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='too much for its size'):
        read(str(tmp_path / 'a.pth'))


def test_a_tensor_of_many_names_is_looked_at_once(monkeypatch):
    looked_at = []
    monkeypatch.setattr(
        sources, '_all_finite', lambda value: looked_at.append(value) or True
    )
    tensor = torch.ones(3)
    check_values({f'w{i}': tensor for i in range(100)}, 'a.pth')
    assert len(looked_at) == 1


def test_many_tuples_as_keys(tmp_path):
    # -1 and -2 have one hash, and so have all of these.
    many = {tup: 0 for tup in itertools.product((-1, -2), repeat=8)}
    torch.save(many, tmp_path / 'a.pth')
    assert read_content(str(tmp_path / 'a.pth')) == many
    longer = {(*([0] * 8), 1): 0}
    refused(tmp_path / 'b.pth', pickle.dumps(longer, 2), 'of type tuple')
    many = {(i, i): 0 for i in range(5000)}
    refused(tmp_path / 'c.pth', pickle.dumps(many, 2), 'of type tuple')
