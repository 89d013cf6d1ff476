"""Damaged and hostile files: a clear error, or a result that is right.

Some thousand files, made of small real ones by flipping, cutting and
inserting bytes, and of structures that nobody writes.
"""

import math
import random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers import distance, image, randomize
from hypothesis import given, settings
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from torch import nn

from mmdbb import DBB, load_deployed
from mmdbb.checkpoint.deploy import deploy_checkpoint
from mmdbb.checkpoint.files import (
    in_mmengine_form,
    load_strictly,
    read_checkpoint,
)
from mmdbb.checkpoint.formats import write_checkpoint
from mmdbb.checkpoint.load import build_model, written_structure
from mmdbb.errors import UserError

pytestmark = pytest.mark.usefixtures('quiet')


def network():
    return nn.Sequential(DBB(2, 2, 3, padding=1), nn.BatchNorm2d(2)).eval()


def sources(folder):
    """Real files of all forms: name -> bytes."""
    state = network().state_dict()
    buffer = HistoryBuffer()
    buffer.update(1.0)
    run = dict(
        state_dict=state,
        ema_state_dict={f'module.{k}': v for k, v in state.items()},
        meta=dict(epoch=1, cfg='x = 1', seed=np.int64(3)),
        message_hub=dict(log_scalars=dict(loss=buffer)),
    )
    run['ema_state_dict']['steps'] = torch.tensor(3)
    torch.save(run, folder / 'run.pth')
    torch.save(state, folder / 'bare.pth')
    torch.save(
        state, folder / 'legacy.pth', _use_new_zipfile_serialization=False
    )
    try:
        write_checkpoint(str(folder / 'own.safetensors'), state, run['meta'])
    except UserError:  # not installed
        pass
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def flip(data, draw):
    for _ in range(draw.choice([1, 1, 2, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def overwrite(data, draw):
    start = draw.randrange(len(data))
    size = draw.choice([1, 2, 4, 8, 64])
    data[start : start + size] = bytes(
        draw.choice([0, 255, draw.randrange(256)]) for _ in range(size)
    )


def cut(data, draw):
    del data[draw.randrange(len(data)) :]


def remove(data, draw):
    start = draw.randrange(len(data))
    del data[start : start + draw.choice([1, 4, 64, 500])]


def insert(data, draw):
    start = draw.randrange(len(data))
    data[start:start] = bytes(draw.randrange(256) for _ in range(9))


def repeat(data, draw):
    start = draw.randrange(len(data))
    data[start:start] = data[start : start + draw.choice([1, 16, 200])]


def swap(data, draw):
    """Opcodes and names of the pickle, rather than the numbers."""
    words = [b'state_dict', b'running_var', b'FloatStorage', b'cpu', b'_rebui']
    at = data.find(draw.choice(words))
    if at >= 0:
        data[at + draw.randrange(8)] = draw.randrange(256)


MUTATIONS = (flip, overwrite, cut, remove, insert, repeat, swap)


def accepted(path, model):
    """Read and load a file; True if it was taken, False if refused."""
    try:
        loaded = read_checkpoint(path)
        written_structure(loaded)
        load_strictly(model, loaded['state_dict'], path)
    except UserError as error:
        assert '\n' not in str(error)
        return False
    return True


@pytest.mark.parametrize(
    'name', ['bare.pth', 'legacy.pth', 'own.safetensors', 'run.pth']
)
def test_damaged_files(tmp_path, name):
    found = sources(tmp_path)
    if name not in found:
        pytest.skip('safetensors is not installed')
    draw = random.Random(name)
    path = tmp_path / f'damaged-{name}'
    model, taken = network(), 0
    for i in range(600):
        data = bytearray(found[name])
        for _ in range(draw.choice([1, 1, 1, 3])):
            if data:
                MUTATIONS[i % len(MUTATIONS)](data, draw)
        path.write_bytes(data)
        taken += accepted(str(path), model)
        # What was taken is a network that computes.
        conv = model[0].to_conv() if i % 20 == 0 else None
        assert conv is None or conv.weight.isfinite().all()
    assert 0 < taken < 600  # both happen: a flipped bit in a weight is one


TENSORS = st.sampled_from(
    [
        torch.ones(2),
        torch.ones(0),
        torch.tensor(3),
        torch.tensor(1 + 1j),
        torch.tensor([True]),
        torch.ones(2, dtype=torch.float16),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.tensor([math.nan]),
        torch.ones(2).to_sparse(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.empty(2, device='meta'),
        torch.ones(1).expand(10**12),
        nn.Parameter(torch.ones(2)),
    ]
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), TENSORS
)
NAMES = st.one_of(
    st.sampled_from(
        [
            'state_dict',
            'model',
            'meta',
            'ema_state_dict',
            'state_dict_ema',
            'model_ema',
            'mmdbb',
            'steps',
            'n_averaged',
            'module.weight',
            'module.',
            '_orig_mod.module.weight',
            'weight',
            'running_var',
            'w_delta',
        ]
    ),
    st.text(max_size=3),
    st.integers(),
    st.none(),
)
STRUCTURES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(
    content=STRUCTURES,
    ema=st.sampled_from([None, True, False]),
)
def test_structures_that_nobody_writes(content, ema):
    try:
        found = in_mmengine_form(content, 'a.pth', ema, size=1000)
        written_structure(found)
        load_strictly(nn.Linear(2, 2), found['state_dict'], 'a.pth')
    except UserError as error:
        assert 'a.pth' in str(error)
        return
    raise AssertionError('no such structure fits')


CONV = dict(
    type='ConvModule',
    in_channels=3,
    out_channels=2,
    kernel_size=3,
    padding=1,
    conv_cfg=dict(type='DBB'),
    norm_cfg=dict(type='BN'),
)


def test_what_is_written_of_damaged_files_is_right(tmp_path):
    """The whole way: written is what the damaged file computes, or nothing."""
    cfg = Config(dict(model=CONV))
    model = randomize(build_model(cfg))
    source, out = tmp_path / 'in.pth', tmp_path / 'out' / 'a.pth'
    torch.save(model.state_dict(), source)
    whole, draw = source.read_bytes(), random.Random(0)
    written = 0
    x = image(2, 3, 7, 9, dtype=torch.float32)
    for i in range(60):
        data = bytearray(whole)
        MUTATIONS[i % len(MUTATIONS)](data, draw)
        source.write_bytes(data)
        try:
            deploy_checkpoint(
                cfg, str(source), str(out), image_size=(7, 9), overwrite=True
            )
        except UserError:
            assert not out.exists()
            continue
        model.load_state_dict(torch.load(source, weights_only=True))
        found = load_deployed(str(out.with_suffix('.py')), str(out))
        assert distance(found(x), model(x)) < 1e-4
        written += 1
        out.unlink()
        out.with_suffix('.py').unlink()
    assert 5 < written < 60
