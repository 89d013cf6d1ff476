"""Damaged and hostile files: a clear error, or a result that is right.

Some thousand files, made of small real ones (`tests/fuzz.py`), and structures
that nobody writes.
"""

import math
import random

import hypothesis.strategies as st
import pytest
import torch
from fuzz import MUTATIONS, OUTCOMES, SUMS, fuzz
from helpers import deploy, distance, image, randomize
from hypothesis import given, settings
from mmengine.config import Config
from torch import nn

from mmdbb import load_deployed
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import in_mmengine_form, load_strictly
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.structure import written_structure

pytestmark = pytest.mark.usefixtures('quiet')


def test_damaged_files(tmp_path):
    """Some thousand; `make fuzz` tries more of the same."""
    outcomes = fuzz(tmp_path, cases=4000, seed=0)
    for case, counts in outcomes.items():
        assert not counts.get('fault'), (case, counts)
        if case.layer == 'bytes' and SUMS[case.name]:
            # No other number is ever taken for what was written.
            assert not counts.get('other'), case
    tried = {case.name for case in outcomes}
    assert tried >= {'run.pth', 'bare.pth', 'deflated.pth', 'legacy.pth'}
    total = {
        name: sum(counts.get(name, 0) for counts in outcomes.values())
        for name in OUTCOMES
    }
    # All of them happen: a bit between the members is nothing's.
    assert min(total[name] for name in ('refused', 'right', 'other')) > 20


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
            deploy(
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
