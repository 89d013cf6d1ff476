"""OREPA's kernels: what they start as, what their forms are, their cost."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT, distance, image
from torch import nn

from mmdbb.geometry import ConvSpec
from mmdbb.kernels import (
    KxKKernel,
    PlainKernel,
    PointwiseKernel,
    StackedKernel,
)
from mmdbb.transforms import compose_stack, frequency_prior


@torch.no_grad()
def jiggled(kernel):
    torch.manual_seed(0)
    for parameter in kernel.parameters():
        parameter.add_(torch.randn_like(parameter))
    return kernel.double()


def test_start_values_are_those_of_the_paper():
    torch.manual_seed(0)
    kernel = KxKKernel(ConvSpec(16, 32, 3))
    starts = [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]
    assert kernel.scale.tolist() == [[s] * 32 for s in starts]
    assert not kernel.inner1.any()
    for name, fan_in in (
        ('origin', 16 * 9),
        ('avg', 16),
        ('prior', 16),
        ('pointwise', 16),
        ('inner2', 16 * 9),
        ('depthwise', 9),
        ('separable', 16 * 8),
    ):
        bound = math.sqrt(6 / fan_in)
        largest = getattr(kernel, name).abs().max()
        assert 0.9 * bound < largest <= bound, name


def test_start_values_in_repvgg():
    kernel = KxKKernel(ConvSpec(16, 32, 3), with_1x1=False)
    assert kernel.pointwise is None
    assert kernel.scale[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 0.5]
    bound = math.sqrt(3 / (16 * 9))
    assert 0.9 * bound < kernel.origin.abs().max() <= bound


def test_factors_on_start_values():
    torch.manual_seed(0)
    plain = KxKKernel(ConvSpec(4, 6, 3))
    torch.manual_seed(0)
    scaled = KxKKernel(ConvSpec(4, 6, 3), weight_init=4.0, scale_init=9.0)
    for name, value in plain.named_parameters():
        factor = dict(scale=3.0, depthwise=2.0, separable=2.0, inner1=0.0)
        expected = value * factor.get(name, 4.0)
        assert distance(getattr(scaled, name), expected) < 1e-6, name


def test_pointwise_starts_with_an_identity_on_the_smaller_side():
    wide = PointwiseKernel(ConvSpec(4, 6, 1))
    assert torch.equal(wide.inner1[:, :, 0, 0], torch.eye(4))
    narrow = PointwiseKernel(ConvSpec(6, 4, 1))
    assert torch.equal(narrow.inner2[:, :, 0, 0], torch.eye(4))
    assert wide.scale[:, 0].tolist() == [1.0, 0.5]


@pytest.mark.parametrize('size', [2, 3, 4, 5, (2, 3), (1, 5)])
def test_the_prior_is_filled_for_any_size(size):
    """The paper's code reads what memory held, from 5x5 on."""
    height, width = size if isinstance(size, tuple) else (size, size)
    found = frequency_prior(5, (height, width))
    assert found.shape == (5, height, width)
    for i in range(5):
        for h in range(height):
            for w in range(width):
                down = (h + 0.5) * (i + 1) / height
                along = (w + 0.5) * (i + 1 - 2.5) / width
                expected = math.cos(math.pi * (down if i < 2.5 else along))
                assert abs(found[i, h, w] - expected) < 1e-12


def test_internal_channels():
    spec = ConvSpec(8, 8, 3, groups=8)
    assert KxKKernel(spec).inner1.shape[0] == 16
    assert KxKKernel(ConvSpec(8, 8, 3, groups=4)).inner1.shape[0] == 8
    assert KxKKernel(ConvSpec(8, 8, 3), 12)().shape == (8, 8, 3, 3)
    for wrong in (0, 12.0, 3):
        with pytest.raises(ValueError, match='multiple of groups=8'):
            KxKKernel(spec, wrong)
    with pytest.raises(ValueError, match='multiple of groups=1, got True'):
        KxKKernel(ConvSpec(8, 8, 3), True)


@pytest.mark.parametrize('groups', [1, 2, 3, 6])
@pytest.mark.parametrize('times', [1, 2])
def test_the_inner_1x1_starts_as_the_identity_of_each_group(groups, times):
    spec = ConvSpec(6, 12, 3, groups=groups)
    kernel = KxKKernel(spec, internal_channels=6 * times).double()
    x = image(2, 6, 4, 5)
    found = F.conv2d(x, kernel.inner1 + kernel.identity, groups=groups)
    each = x.unflatten(1, (groups, -1))
    expected = torch.cat([each] * times, 2).flatten(1, 2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize('groups', [1, 2])
def test_a_stack_of_kernels_that_are_not_square(groups):
    first = image(4, 6 // groups, 2, 5, seed=1)
    second = image(8, 4 // groups, 4, 3, seed=2)
    x = image(2, 6, 9, 11)
    expected = F.conv2d(
        F.conv2d(x, first, groups=groups), second, groups=groups
    )
    kernel = compose_stack(first, second, groups)
    assert kernel.shape == (8, 6 // groups, 5, 7)
    assert distance(F.conv2d(x, kernel, groups=groups), expected) < EXACT


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('flip', [True, False])
def test_a_flipped_stack_is_the_sequence_of_its_convolutions(groups, flip):
    """What nn.Conv2d modules in a row give, which the paper's code is not."""
    spec = ConvSpec(4, 6, 7, groups=groups)
    stack = jiggled(StackedKernel(spec, composed=False, flip=flip))
    row = nn.Sequential()
    for layer in stack.layers:
        conv = nn.Conv2d(
            layer.spec.in_channels, 6, 3, groups=groups, bias=False
        ).double()
        conv.weight.data.copy_(layer.weight)
        row.append(conv)
    x = image(2, 4, 9, 11)
    found = nn.functional.conv2d(x, stack(), groups=groups)
    assert (distance(found, row(x)) < EXACT) is flip


def test_composing_a_stack_by_hand():
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    a, b = first.reshape(1, 1, 1, 2), second.reshape(1, 1, 1, 2)
    assert compose_stack(a, b).flatten().tolist() == [3, 11, 10]
    assert compose_stack(a, b, flip=False).flatten().tolist() == [5, 13, 6]


@pytest.mark.parametrize('size', [3, 6, (7, 5), 1])
def test_what_is_no_stack(size):
    with pytest.raises(ValueError, match='square with an odd side'):
        StackedKernel(ConvSpec(3, 4, size))


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('out', [2, 4, 8])
def test_the_smaller_1x1_starts_as_the_identity(out, groups):
    kernel = PointwiseKernel(ConvSpec(4, out, 1, groups=groups))
    smaller = kernel.inner1 if out > 4 else kernel.inner2
    eye = torch.eye(min(4, out) // groups).repeat(groups, 1)
    assert torch.equal(smaller.flatten(1), eye)


@pytest.mark.parametrize(
    'kernel',
    [
        KxKKernel(ConvSpec(4, 6, 3)),
        PointwiseKernel(ConvSpec(4, 6, 1)),
        StackedKernel(ConvSpec(4, 6, 7)),
        PlainKernel(ConvSpec(4, 6, 3)),
    ],
    ids=lambda k: type(k).__name__,
)
def test_single_init_is_the_original_kernel(kernel):
    kernel.single_init()
    if isinstance(kernel, StackedKernel):
        expected = kernel.layers[0].origin
        for layer in list(kernel.layers)[1:]:
            expected = compose_stack(expected, layer.origin, flip=False)
    else:
        expected = getattr(kernel, 'origin', None)
        expected = kernel.weight if expected is None else expected
    assert distance(kernel(), expected) < 1e-6


def test_autocast_leaves_the_kernel_exact():
    kernel = KxKKernel(ConvSpec(4, 6, 3))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = kernel()
    assert found.dtype == torch.float32
    assert torch.equal(found, kernel())


def test_gradients_reach_every_parameter():
    kernel = jiggled(KxKKernel(ConvSpec(4, 8, 3, groups=2)))
    parameters = list(kernel.parameters())
    assert torch.autograd.gradcheck(lambda *_: kernel(), parameters)
