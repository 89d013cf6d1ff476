"""Every block on random geometries: sum of branches against merged."""

import pytest
import torch
from helpers import (
    EXACT,
    SINGLE,
    distance,
    geometries,
    image,
    plain_conv,
    randomize,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from registered import branches_of_pictures, each_block

from mmdbb.blocks import DBB, BranchSumConv2d
from mmdbb.geometry import ConvSpec


def check(block, shape, tolerance, dtype):
    block = randomize(block.to(dtype)).eval()
    x = image(*shape, dtype=dtype)
    expected = block.forward_branches(x)
    # Whatever computes the block before merging, and after.
    assert distance(block(x), expected) < tolerance
    kernel, bias = block.get_equivalent_kernel_bias()
    plain = plain_conv(block.spec, kernel, bias)
    assert distance(plain(x), expected) < tolerance
    block.switch_to_deploy()
    assert distance(block(x), expected) < tolerance


@each_block(argument='block')
@given(case=geometries())
@settings(max_examples=60)
def test_block_is_its_merged_convolution(block, case):
    arguments, shape = case
    check(block(**arguments), shape, EXACT, torch.float64)


@each_block(argument='block')
@given(case=geometries())
@settings(max_examples=15)
def test_block_in_float32(block, case):
    arguments, shape = case
    check(block(**arguments), shape, SINGLE, torch.float32)


@given(
    case=geometries(kernels=(2, 3, 5, (2, 3)), same_channels=True),
    names=st.lists(
        st.sampled_from(branches_of_pictures()), min_size=1, max_size=5
    ),
)
@settings(max_examples=40)
def test_any_list_of_branches(case, names):
    arguments, shape = case
    block = BranchSumConv2d(**arguments, branches=names)
    assert len(block.branches) == len(names)
    check(block, shape, EXACT, torch.float64)


@each_block(argument='block')
@pytest.mark.parametrize('training', [True, False])
@given(case=geometries())
@settings(max_examples=15)
def test_forward_is_the_literal_sum(block, training, case):
    """However fast forward computes it: values, gradients, statistics."""
    arguments, shape = case
    # One number a channel has no variance; the batch gives two.
    fast = randomize(block(**arguments).double()).train(training)
    literal = randomize(block(**arguments).double()).train(training)
    literal.load_state_dict(fast.state_dict())
    x = image(*shape).requires_grad_()
    y = image(*shape).requires_grad_()
    a, b = fast(x), literal.forward_branches(y)
    assert distance(a, b) < EXACT
    weight = image(*a.shape, seed=1)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    scale = max(p.grad.abs().max() for p in literal.parameters())
    scale = max(scale, y.grad.abs().max())
    pairs = zip(fast.parameters(), literal.parameters())
    for p, q in [(x, y), *pairs]:
        # Two values of one magnitude: their norm divides by its own
        # variance, whose rounding the gradient multiplies.
        assert (p.grad - q.grad).abs().max() <= 1e-8 * scale
    for (name, p), q in zip(fast.named_buffers(), literal.buffers()):
        assert distance(p, q) < EXACT, name


@each_block(argument='block')
@pytest.mark.parametrize('padding', range(5))
@pytest.mark.parametrize('kernel', [2, 3, (2, 3)])
def test_odd_and_even_inputs(block, padding, kernel):
    """For k=2 on an odd input the papers' code gives wrong numbers."""
    for height, width in ((6, 7), (7, 6), (7, 9)):
        check(
            block(4, 6, kernel, 2, padding),
            (2, 4, height, width),
            EXACT,
            torch.float64,
        )


def test_geometry_of_the_output_is_that_of_conv2d():
    block = DBB(4, 6, (2, 3), (2, 1), (2, 0), (1, 2))
    conv = torch.nn.Conv2d(4, 6, (2, 3), (2, 1), (2, 0), (1, 2))
    x = image(2, 4, 7, 8, dtype=torch.float32)
    assert block(x).shape == conv(x).shape
    assert isinstance(block.spec, ConvSpec)
