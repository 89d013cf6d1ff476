"""The branch ``kxk`` with a kernel of its own, smaller or dilated."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EXACT,
    assert_same,
    distance,
    every_batch_is_large,
    geometries,
    image,
    plain_conv,
    randomize,
    state,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmdbb.blocks import BranchSumConv2d
from mmdbb.branches import build_branch
from mmdbb.geometry import ConvSpec
from mmdbb.transforms import dilate_kernel

SIZES = (1, 2, 3, (1, 3), (3, 2), 5)


def build(spec, seed=0, **options):
    branch = build_branch(dict(type='kxk', **options), spec).double()
    return randomize(branch, seed).eval()


# The algebra


def test_dilate_kernel_exact():
    kernel = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert dilate_kernel(kernel, (1, 1)) is kernel
    assert dilate_kernel(kernel, (2, 3))[0, 0].tolist() == [
        [1, 0, 0, 2],
        [0, 0, 0, 0],
        [3, 0, 0, 4],
    ]
    assert dilate_kernel(kernel[:, :, :1], (5, 2)).tolist() == [[[[1, 0, 2]]]]


@pytest.mark.parametrize(
    'convolve, dilation',
    [(F.conv1d, (3,)), (F.conv2d, (2, 3)), (F.conv3d, (2, 1, 3))],
)
def test_dilate_kernel_is_the_dilated_convolution(convolve, dilation):
    """In one, two and three dimensions."""
    size = (3, 2, 4)[: len(dilation)]
    x = image(2, 4, *(d * k + 2 for d, k in zip(dilation, size)))
    kernel = image(6, 2, *size, seed=1).requires_grad_()
    expected = convolve(x, kernel, dilation=dilation, groups=2)
    found = convolve(x, dilate_kernel(kernel, dilation), groups=2)
    assert distance(found, expected) < EXACT
    assert torch.autograd.gradcheck(
        lambda kernel: dilate_kernel(kernel, dilation), kernel
    )


def test_dilate_kernel_wants_a_number_a_dimension():
    with pytest.raises(
        ValueError, match=r'dilation must be 2 numbers.*\(2,\)'
    ):
        dilate_kernel(torch.ones(1, 1, 3, 3), (2,))


def test_where_a_smaller_kernel_stands_exact():
    spec = ConvSpec(1, 1, (7, 6), padding=(3, 1), dilation=(1, 2))
    assert spec.has_room_for((3, 2), (3, 5))
    assert spec.offset_of((3, 2), (3, 5)) == (0, 0)
    assert spec.pads_of((3, 2), (3, 5)) == (3, 3, 1, 1)
    assert spec.offset_of((5, 4)) == (1, 1)
    assert spec.pads_of((5, 4)) == (2, 2, -1, -1)  # crops two columns
    for size, dilation in (((4, 2), (1, 1)), ((3, 3), (1, 1))):  # no middle
        assert not spec.has_room_for(size, dilation)
    for size, dilation in (((9, 2), (1, 1)), ((3, 2), (4, 1))):  # too large
        assert not spec.has_room_for(size, dilation)


# The branch


@given(
    case=geometries(kernels=(3, 4, 5, 7, (5, 4), (1, 7), (6, 3))),
    size=st.sampled_from(SIZES),
    dilation=st.sampled_from([1, 2, 3, (1, 2), (2, 1)]),
)
@settings(max_examples=80)
def test_branch_is_its_merged_convolution(case, size, dilation):
    arguments, shape = case
    spec = ConvSpec(**arguments)
    assume(spec.has_room_for(*spec.inner_kernel(size, dilation)))
    branch = build(spec, kernel_size=size, dilation=dilation)
    kernel, bias = branch.equivalent_kernel_bias()
    assert kernel.shape == spec.kernel_shape
    x = image(*shape)
    assert distance(plain_conv(spec, kernel, bias)(x), branch(x)) < EXACT
    # Only the taps that it has.
    taps = branch.conv.weight[0, 0].numel()
    assert (kernel[0, 0] != 0).sum() == taps
    # Around the middle: turned over it is the kernel of the one turned over.
    with torch.no_grad():
        branch.conv.weight.copy_(branch.conv.weight.flip(2, 3))
    turned, _ = branch.equivalent_kernel_bias()
    assert torch.equal(turned, kernel.flip(2, 3))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(kernel_size=4), r'kxk \(kernel_size=4\)'),
        (dict(kernel_size=9), r'kxk \(kernel_size=9\)'),
        (dict(dilation=2), r'kxk \(dilation=2\)'),
        (dict(kernel_size=3, dilation=4), r'\(kernel_size=3, dilation=4\)'),
        (dict(kernel_size=(3, 4)), r'kxk \(kernel_size=\(3, 4\)\)'),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_and_named(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build(ConvSpec(4, 4, 7), **options)
    assert 'dilation * (kernel_size - 1) + 1 must be at' in str(error.value)
    assert 'kernel_size=(7, 7)' in str(error.value)


@pytest.mark.parametrize(
    'error, options, message',
    [
        (ValueError, dict(kernel_size=0), 'kernel_size must be .* at least 1'),
        (ValueError, dict(kernel_size=3, dilation=0), 'dilation .* got 0'),
        (TypeError, dict(kernel_size='5'), "kernel_size .* got '5'"),
        (TypeError, dict(kernel_size=3.0), 'kernel_size .* got 3.0'),
        (TypeError, dict(kernel_size=3, dilation=True), 'dilation .* True'),
        (TypeError, dict(dilations=2), r"unknown keys \['dilations'\]"),
    ],
    ids=str,
)
def test_what_is_no_size_is_refused(error, options, message):
    with pytest.raises(error, match=message):
        build(ConvSpec(4, 4, 7), **options)


# In a block


SMALL = [
    dict(type='kxk', kernel_size=5),
    dict(type='kxk', kernel_size=3, dilation=3),
    dict(type='kxk', kernel_size=(1, 3)),
    dict(type='kxk', kernel_size=7),
    'kxk',
    dict(type='kxk', kernel_size=5),
    dict(type='kxk', kernel_size=(3, 5), dilation=(1, 1), norm=False),
]


def test_keys_say_which_kernel():
    block = BranchSumConv2d(4, 4, 7, branches=SMALL)
    assert list(block.branches) == [
        'kxk_k5',
        'kxk_k3_d3',
        'kxk_k1x3',
        'kxk',  # given, and as large as the block's
        'kxk_2',
        'kxk_k5_2',
        'kxk_k3x5',
    ]
    assert block.branches['kxk_k3_d3'].conv.dilation == (3, 3)
    assert block.branches['kxk_k3x5'].norm is None


@pytest.mark.parametrize('order', [1, -1])
def test_plain_weights_go_into_a_kernel_of_the_whole_size(order):
    block = BranchSumConv2d(4, 4, 7, padding=3, branches=SMALL[:5][::order])
    assert block.dense_branch == 'kxk'
    assert BranchSumConv2d(4, 4, 7, branches=SMALL[:3]).dense_branch is None
    plain = torch.nn.Conv2d(4, 4, 7, padding=3)
    block.load_state_dict(plain.state_dict())
    x = image(2, 4, 9, 8, dtype=torch.float32)
    assert distance(block.eval()(x), plain(x)) < 1e-5


def test_a_changed_geometry_reaches_it():
    """As OpenMMLab's networks dilate what they have built."""
    branches = ['kxk', *SMALL[:3]]
    block = BranchSumConv2d(4, 4, 7, padding=3, branches=branches)
    block = randomize(block.double()).eval()
    block.stride, block.dilation, block.padding = (2, 1), (2, 3), (5, 9)
    assert block.branches['kxk_k3_d3'].conv.dilation == (6, 9)
    x = image(2, 4, 15, 22)
    kernel, bias = block.get_equivalent_kernel_bias()
    expected = plain_conv(block.spec, kernel, bias)(x)
    assert distance(block.forward_branches(x), expected) < EXACT
    with pytest.raises(ValueError, match='dilation .* inside a block'):
        block.branches['kxk_k5'].conv.dilation = (1, 1)
        block(x)


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('padding', ['adaptive', 2])
def test_trains_as_the_literal_sum(groups, padding):
    block = BranchSumConv2d(
        4,
        4,
        7,
        stride=2,
        padding=padding,
        groups=groups,
        branches=['kxk', *SMALL[:3]],
    )
    block = randomize(block.double()).train()
    twin = copy.deepcopy(block)
    x, y = (image(3, 4, 11, 12).requires_grad_() for _ in range(2))
    with every_batch_is_large():
        a, b = block(x), twin.forward_branches(y)
    (a * image(*a.shape, seed=1)).sum().backward()
    (b * image(*b.shape, seed=1)).sum().backward()
    assert_same(state(block, a, x.grad), state(twin, b, y.grad))
