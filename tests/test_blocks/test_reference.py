"""The papers' released code, number by number.

The vectors in tests/data are recorded and checked by its ``record.py``, which
runs that code.
"""

import functools
import io
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EXACT

import mmdbb

OURS = Path(__file__).resolve().parents[1] / 'data'
# All cases, where the folder is there that the data were taken from.
THEIRS = Path(os.environ.get('MMDBB_REFERENCE') or OURS)
FILES = ('dbb', 'acb', 'orepa', 'repvgg', 'newer')
DATA = {name: OURS if name == 'newer' else THEIRS for name in FILES}
META = {
    name: json.loads((folder / f'{name}.json').read_text())
    for name, folder in DATA.items()
}
CASES = [(name, case) for name in FILES for case in META[name]]
#: Several forward passes before one backward pass: a shared head's step.
SHARED = json.loads((OURS / 'two_forwards.json').read_text())


@functools.lru_cache(maxsize=1)
def stored(folder, file):
    """The arrays of a file, which is packed in the tests' data."""
    packed = folder / f'{file}.npz.xz'
    if packed.exists():
        content = lzma.decompress(packed.read_bytes())
    else:
        content = (folder / f'{file}.npz').read_bytes()
    with np.load(io.BytesIO(content)) as arrays:
        return {key: np.array(arrays[key]) for key in arrays.files}


class Reference:
    """One case: the block, and the arrays that the papers' code gave."""

    def __init__(self, meta, folder, file, case):
        self.arrays = {
            key[len(case) + 1 :]: torch.from_numpy(value.copy())
            for key, value in stored(folder, file).items()
            if key.startswith(f'{case}/')
        }
        self.block = getattr(mmdbb, meta['cls'])(**meta['kwargs']).double()
        self.block.load_state_dict(self.group('state/'))

    def __getitem__(self, field):
        return self.arrays[field]

    def group(self, prefix):
        return {
            key[len(prefix) :]: value
            for key, value in self.arrays.items()
            if key.startswith(prefix)
        }

    def ours(self, name):
        """The name here of an entry of the papers' state dict."""
        for theirs, ours in self.block.names:
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name

    def step(self):
        """One training step: output and gradient of the input."""
        x = self['input'].clone().requires_grad_()
        y = self.block.train()(x)
        y.backward(self['train/grad_output'])
        return y, x.grad

    def shared_step(self):
        """One training step of a block that several images go through."""
        xs = [x.requires_grad_() for x in self.group('input/').values()]
        ys = [self.block.train()(x) for x in xs]
        grads = self.group('train/grad_output/').values()
        sum((y * grad).sum() for y, grad in zip(ys, grads)).backward()
        return ys, [x.grad for x in xs]


@pytest.fixture(params=CASES, ids='/'.join)
def reference(request):
    file, case = request.param
    return Reference(META[file][case], DATA[file], file, case)


@pytest.fixture(params=SHARED)
def shared(request):
    case = request.param
    return Reference(SHARED[case], OURS, 'two_forwards', case)


def assert_close(found, expected, what, scale=None):
    assert found.shape == expected.shape, what
    if scale is None:
        scale = expected.abs().max()
    error = (found - expected).abs().max()
    assert error <= EXACT * scale, f'{what}: {error:.1e} of {scale:.1e}'


def assert_gradients_close(reference):
    parameters = dict(reference.block.named_parameters())
    grads = reference.group('train/grad/')
    # A convolution's weight of one channel, which a norm follows, has a
    # gradient of zero but for eps: what remains is the rounding error of
    # numbers as large as the family's largest gradient.
    family = max(g.abs().max() for g in grads.values())
    for name, expected in grads.items():
        found = parameters[reference.ours(name)].grad
        if name == 'rbr_dense.vector':  # its sixth row is never read
            assert not expected[5:].any()
            expected = expected[:5]
        largest = expected.abs().max()
        scale = family if largest < 1e-3 * family else largest
        assert_close(found, expected, f'gradient of {name}', scale)


def assert_buffers_close(reference):
    buffers = dict(reference.block.named_buffers())
    for name, expected in reference.group('train/buffers/').items():
        found = buffers[reference.ours(name)]
        assert_close(found.double(), expected.double(), name)


def assert_every_field_is_there(reference):
    assert set(reference.group('train/buffers/')) <= set(
        reference.group('state/')
    )
    parameters = dict(reference.block.named_parameters())
    grads = {reference.ours(n) for n in reference.group('train/grad/')}
    # The weight of an affine norm too: every parameter has its gradient.
    assert grads == set(parameters)
    buffers = {reference.ours(n) for n in reference.group('train/buffers/')}
    assert buffers == set(dict(reference.block.named_buffers()))


def test_every_field_of_a_case_is_there(reference):
    assert_every_field_is_there(reference)


def test_training_step(reference):
    y, grad_input = reference.step()
    assert_close(y, reference['train/output'], 'output')
    assert_close(grad_input, reference['train/grad_input'], 'grad_input')
    assert_gradients_close(reference)


def test_buffers_after_the_step(reference):
    reference.step()
    assert_buffers_close(reference)


def test_two_forwards_before_one_backward(shared):
    assert_every_field_is_there(shared)
    outputs, grad_inputs = shared.shared_step()
    assert len(outputs) == 2
    for i, (y, grad_input) in enumerate(zip(outputs, grad_inputs)):
        assert_close(y, shared[f'train/output/{i}'], f'output {i}')
        expected = shared[f'train/grad_input/{i}']
        assert_close(grad_input, expected, f'grad_input {i}')
    assert_gradients_close(shared)
    assert_buffers_close(shared)


def test_eval_and_merged(reference):
    reference.step()
    block = reference.block.eval()
    assert_close(block(reference['input']), reference['eval/output'], 'eval')
    kernel, bias = block.get_equivalent_kernel_bias()
    assert_close(kernel, reference['eval/kernel'], 'kernel')
    assert_close(bias, reference['eval/bias'], 'bias')
    block.switch_to_deploy()
    found = block(reference['input'])
    assert_close(found, reference['eval/output'], 'merged')


def test_numbers_are_not_trivial(reference):
    """The vectors bite: the border is not zero, gammas are not one."""
    for name, value in reference.group('state/').items():
        if name.endswith('running_mean'):
            assert value.abs().max() > 0.01, name
        if name.endswith('running_var'):
            assert (value - 1).abs().max() > 0.01, name
