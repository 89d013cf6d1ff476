"""Geometry against actual convolutions, and hand-written numbers."""

import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT, distance, geometries, image
from hypothesis import given, settings
from torch import nn

from mmdbb.geometry import (
    PADDING_MODES,
    ConvSpec,
    add_shift,
    border_mask,
    pad2d,
)


def test_pads_exact():
    assert ConvSpec(1, 1, 3, padding=(1, 2)).pads == (1, 1, 2, 2)
    assert ConvSpec(1, 1, 4, padding='same').pads == (1, 2, 1, 2)
    assert ConvSpec(1, 1, (2, 3), padding='same').pads == (0, 1, 1, 1)
    assert ConvSpec(1, 1, 3, padding='same', dilation=2).padding == (2, 2)
    assert ConvSpec(1, 1, 2, padding='same', dilation=2).pads == (1,) * 4
    assert ConvSpec(1, 1, 5, padding='valid').padding == (0, 0)


def test_centre_exact():
    assert ConvSpec(1, 1, 3, padding=1).centre == (1, 1)
    assert ConvSpec(1, 1, 5, padding=0).centre == (2, 2)
    assert ConvSpec(1, 1, (1, 3), padding=(0, 1)).centre == (0, 1)
    # Of two middle taps the one nearer to the output's own pixel.
    assert ConvSpec(1, 1, 2, padding=0).centre == (0, 0)
    assert ConvSpec(1, 1, 2, padding=1).centre == (1, 1)
    assert ConvSpec(1, 1, 4, padding='same').centre == (1, 1)
    assert ConvSpec(1, 1, 4, padding=2).centre == (2, 2)


def test_of_two_taps_equally_near_the_later_is_the_centre():
    # Taps at -1 and 1 pixel, in both directions or in one.
    spec = ConvSpec(1, 1, 2, padding=1, dilation=2)
    assert spec.pads == (1, 1, 1, 1)
    assert spec.centre == (1, 1)
    assert spec.pads_of((1, 1)) == (-1, 1, -1, 1)
    spec = ConvSpec(1, 1, (4, 3), padding=(3, 2), dilation=2)
    assert spec.centre == (2, 1)
    assert spec.offset_of((1, 3)) == (2, 0)
    spec = ConvSpec(1, 1, (2, 4), padding='same', dilation=2)
    assert spec.centre == (1, 2)
    # Near in pixels, which are not taps: those at 0 and 2 here.
    assert ConvSpec(1, 1, 4, padding=2, dilation=2).centre == (1, 1)


def test_pads_of_exact():
    assert ConvSpec(1, 1, 3, padding=1).pads_of((1, 1)) == (0, 0, 0, 0)
    assert ConvSpec(1, 1, 3, padding=0).pads_of((1, 1)) == (-1,) * 4
    assert ConvSpec(1, 1, 5, padding=3).pads_of((1, 1)) == (1,) * 4
    assert ConvSpec(1, 1, 3, padding=1).pads_of((3, 1)) == (1, 1, 0, 0)
    spec = ConvSpec(1, 1, 4, padding='same')
    assert spec.pads_of((1, 1)) == (0, 0, 0, 0)
    spec = ConvSpec(1, 1, 2, padding=0)
    assert spec.pads_of((1, 1)) == (0, -1, 0, -1)
    spec = ConvSpec(1, 1, 3, padding=2, dilation=2)
    assert spec.pads_of((1, 3)) == (0, 0, 2, 2)


def test_normalised_arguments_are_pairs():
    spec = ConvSpec(4, 8, 3, 2, 1, 2, 2, 'reflect')
    assert spec.kernel_size == (3, 3)
    assert spec.stride == spec.dilation == (2, 2)
    assert spec.padding == (1, 1)
    assert spec.kernel_shape == (8, 2, 3, 3)
    conv = nn.Conv2d(**spec.conv_args)
    assert conv.weight.shape == spec.kernel_shape
    assert spec == ConvSpec(4, 8, [3, 3], (2, 2), [1, 1], 2, 2, 'reflect')
    assert len({spec, ConvSpec(4, 8, (3, 3), 2, 1, 2, 2, 'reflect')}) == 1


def test_kinds():
    assert ConvSpec(4, 4, 3, groups=4).is_depthwise
    assert not ConvSpec(4, 8, 3, groups=4).is_depthwise
    assert not ConvSpec(4, 4, 3, groups=2).is_depthwise
    assert ConvSpec(4, 4, 1).is_pointwise
    assert not ConvSpec(4, 4, (1, 3)).is_pointwise


@pytest.mark.parametrize(
    'error, arguments, message',
    [
        (ValueError, dict(in_channels=0), 'in_channels must be at least 1'),
        (TypeError, dict(in_channels=2.0), 'in_channels must be an int'),
        (TypeError, dict(groups=True), 'groups must be an int'),
        (
            ValueError,
            dict(groups=3),
            'in_channels must be divisible by groups.*groups=3',
        ),
        (
            ValueError,
            dict(out_channels=7, groups=2),
            'out_channels must be divisible by groups.*out_channels=7',
        ),
        (TypeError, dict(kernel_size='3'), 'kernel_size must be an int or'),
        (TypeError, dict(kernel_size=None), 'kernel_size must be an int or'),
        (ValueError, dict(kernel_size=0), 'kernel_size must be one or two'),
        (ValueError, dict(kernel_size=(3,) * 4), 'must be one to three num'),
        (ValueError, dict(dims=4), 'dims must be 1, 2 or 3, got 4'),
        (ValueError, dict(stride=0), 'stride must be one or two numbers'),
        (ValueError, dict(dilation=(1, 0)), 'dilation must be .* got .1, 0'),
        (ValueError, dict(padding=-1), 'padding must be .* at least 0'),
        (TypeError, dict(padding=1.5), 'padding must be an int or'),
        (
            ValueError,
            dict(padding='full'),
            "'valid' or 'adaptive', got 'full'",
        ),
        (
            ValueError,
            dict(padding='same', stride=2),
            "padding='same' needs stride 1, got stride=",
        ),
        (
            ValueError,
            dict(padding_mode='mirror'),
            "one of zeros, reflect, replicate, circular, got 'mirror'",
        ),
    ],
)
def test_bad_arguments_are_named(error, arguments, message):
    good = dict(in_channels=4, out_channels=8, kernel_size=3)
    with pytest.raises(error, match=message):
        ConvSpec(**{**good, **arguments})


def taps_alone(spec, size):
    """A kernel of the full size that is random where the small one stands."""
    small = image(*spec.kernel_shape[:2], *size, seed=1)
    full = torch.zeros(spec.kernel_shape, dtype=small.dtype)
    row, column = spec.offset_of(size)
    full[..., row : row + size[0], column : column + size[1]] = small
    return small, full


@given(geometries())
@settings(max_examples=150)
def test_small_kernels_read_the_taps_of_the_large_one(case):
    arguments, shape = case
    spec = ConvSpec(**arguments)
    x = image(*shape)
    high, wide = spec.kernel_size
    for size in {(1, 1), (high, 1), (1, wide), (high, wide)}:
        small, full = taps_alone(spec, size)
        reference = nn.Conv2d(**arguments, bias=False).double()
        reference.weight = nn.Parameter(full)
        y = F.conv2d(
            pad2d(x, spec.pads_of(size), spec.padding_mode),
            small,
            None,
            spec.stride,
            0,
            spec.dilation,
            spec.groups,
        )
        assert distance(y, reference(x)) < EXACT


@given(geometries())
@settings(max_examples=50)
def test_shape_of_the_output_is_that_of_conv2d(case):
    arguments, shape = case
    spec = ConvSpec(**arguments)
    y = nn.Conv2d(**arguments)(image(*shape, dtype=torch.float32))
    z = nn.Conv2d(**spec.conv_args)(image(*shape, dtype=torch.float32))
    assert y.shape == z.shape


def test_pad2d_exact():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    padded = pad2d(x, (1, 0, 0, 2))
    expected = [[0.0, 0, 0, 0], [1, 2, 0, 0], [3, 4, 0, 0]]
    assert padded[0, 0].tolist() == expected
    assert pad2d(x, (-1, 0, 0, 1))[0, 0].tolist() == [[3, 4, 0]]
    assert pad2d(x, (0, -1, -1, 0))[0, 0].tolist() == [[2]]
    assert pad2d(x, (0, 0, 0, 0)) is x


@pytest.mark.parametrize('mode', PADDING_MODES)
def test_pad2d_of_every_mode(mode):
    x = image(2, 3, 4, 5)
    found = pad2d(x, (1, 2, 3, 0), mode)
    torch_mode = 'constant' if mode == 'zeros' else mode
    assert torch.equal(found, F.pad(x, (3, 0, 1, 2), torch_mode))


def test_a_shift_gets_its_gradient_in_its_own_precision():
    """A sum of many halves, rounded to half, would be another number."""
    x = torch.zeros(1, 2, 40, 40, dtype=torch.bfloat16, requires_grad=True)
    shift = torch.zeros(2, 1, 1, requires_grad=True)
    grad = image(1, 2, 40, 40).to(torch.bfloat16)
    add_shift(x * 1, shift).backward(grad)
    expected = grad.double().sum((0, 2, 3))
    assert distance(expected.bfloat16(), expected) > 1e-4
    assert distance(shift.grad.flatten(), expected) < 1e-6


def test_border_mask_exact():
    mask = border_mask(torch.zeros(2, 3, 1, 2), (1, 0, 0, 1))
    assert mask.dtype == torch.bool and mask.shape == (1, 1, 2, 3)
    assert mask[0, 0].tolist() == [[True, True, True], [False, False, True]]
