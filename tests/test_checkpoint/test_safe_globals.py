"""mmengine's own checkpoints load safely; anything else is refused."""

import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from packaging.version import Version

import mmdbb  # noqa: F401  the import allow-lists
from mmdbb.checkpoint.safe_globals import (
    STATISTICS,
    allow_mmengine_checkpoints,
)

pytestmark = pytest.mark.skipif(
    Version(torch.__version__).release < (2, 6),
    reason='torch.load is not strict by default',
)


@pytest.fixture(autouse=True)
def _allowed():
    # onedl-mmengine takes the list back after each of its own loads.
    allow_mmengine_checkpoints()


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
    checkpoint = torch.load(work_dir / 'epoch_2.pth')
    scalars = checkpoint['message_hub']['log_scalars']
    loss = scalars['train/loss']
    assert type(loss) is HistoryBuffer
    assert loss.data[0].shape == (4,)
    assert loss.statistics('mean') == pytest.approx(loss.data[0].mean())
    runtime = checkpoint['message_hub']['runtime_info']
    assert runtime['best_score'] > 0


def test_runner_checkpoint_needs_the_allow_list(work_dir):
    # In a process without mmdbb the same file is refused.
    code = f'import torch; torch.load({str(work_dir / "epoch_2.pth")!r})'
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert run.returncode and 'UnpicklingError' in run.stderr
    assert 'getattr' in run.stderr or 'HistoryBuffer' in run.stderr


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
    assert torch.load(path)['method'] is getattr(HistoryBuffer, name)


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
    return path


def calling(function, *arguments):
    """Return a protocol-2 pickle that calls `function` on `arguments`."""

    class Call:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps(dict(loot=Call()), protocol=2)


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
    path = saved(
        tmp_path / 'attribute.pth',
        calling(getattr, HistoryBuffer, attribute),
    )
    with pytest.raises(pickle.UnpicklingError, match=attribute):
        torch.load(path)


@pytest.mark.parametrize(
    'methods',
    [dict(mean=HistoryBuffer.max), dict(mean=3), dict(more=HistoryBuffer.max)],
)
def test_a_file_cannot_change_the_statistics(tmp_path, methods):
    # mmengine would take them over, for all buffers of the process.
    state = dict(HistoryBuffer([1.0], [1]).__getstate__())
    state['statistics_methods'] = methods

    class Buffer:
        def __reduce__(self):
            return HistoryBuffer, (), state

    pickled = pickle.dumps(dict(loot=Buffer()), protocol=2)
    before = dict(HistoryBuffer._statistics_methods)
    path = saved(tmp_path / 'statistics.pth', pickled)
    with pytest.raises(pickle.UnpicklingError, match='mean|more'):
        torch.load(path)
    assert HistoryBuffer._statistics_methods == before


@pytest.mark.parametrize(
    'owner', [np.ndarray, np.dtype, torch.Tensor, dict(), 'text']
)
def test_attributes_of_others_are_refused(tmp_path, owner):
    path = saved(tmp_path / 'owner.pth', calling(getattr, owner, 'mean'))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)


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
    path = saved(tmp_path / 'chain.pth', pickled)
    with pytest.raises(pickle.UnpicklingError, match='__globals__'):
        torch.load(path)


def test_commands_are_refused_and_not_run(tmp_path):
    trace = tmp_path / 'trace'
    for number, function in enumerate([os.system, eval, exec]):
        argument = (
            f'touch {trace}'
            if function is os.system
            else f'open({str(trace)!r}, "w")'
        )
        path = saved(
            tmp_path / f'command{number}.pth', calling(function, argument)
        )
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path)
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
        assert (torch.load(path)['array'] == array).all()


def test_allowing_twice_changes_nothing():
    allow_mmengine_checkpoints()
    before = list(torch.serialization.get_safe_globals())
    allow_mmengine_checkpoints()
    assert len(torch.serialization.get_safe_globals()) == len(before)
