"""The six transformations: hand-written numbers and real convolutions."""

import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT, SINGLE, distance, image, pad_with_values
from torch import nn

from mmdbb.transforms import (
    KernelBias,
    ScaleShift,
    add_branches,
    avg_pool_kernel,
    bn_scale_shift,
    concat_branches,
    fuse_1x1_avg,
    fuse_1x1_kxk,
    fuse_conv_bn,
    identity_kernel,
    pad_kernel,
    unfuse_conv_bn,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# (in, middle, out, groups)
CHANNELS = (
    (3, 5, 4, 1),
    (4, 4, 4, 1),
    (4, 6, 8, 2),
    (6, 6, 6, 6),
    (3, 6, 9, 3),
)
SIZES = ((3, 3), (1, 3), (2, 3), (4, 4), (5, 1))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def kernel_bias(out, inside, size, seed=0):
    kernel = image(out, inside, *size, seed=seed) - 0.5
    return KernelBias(kernel, image(out, seed=seed + 1))


# Transform I


def test_bn_scale_shift_exact():
    scale, shift = bn_scale_shift(
        tensor(1, -3), tensor(3.0, 8.0), tensor(4, -6), tensor(0.5, 1), 1.0
    )
    assert scale.tolist() == [2, -2]
    assert shift.tolist() == [-1.5, -5]
    scale, shift = bn_scale_shift(tensor(2), tensor(0.25), None, None, 0.0)
    assert (scale.item(), shift.item()) == (2, -4)


def test_fuse_conv_bn_exact():
    conv = KernelBias(tensor(1, 2).reshape(2, 1, 1, 1), tensor(10, 20))
    fused = fuse_conv_bn(conv, ScaleShift(tensor(2, -1), tensor(3, 4)))
    assert fused.kernel.flatten().tolist() == [2, -2]
    assert fused.bias.tolist() == [23, -16]


@pytest.mark.parametrize('eps', [1e-5, 0.1])
@pytest.mark.parametrize('affine', [True, False])
def test_fuse_conv_bn_is_a_convolution_and_a_norm(eps, affine):
    kernel, bias = kernel_bias(6, 2, (2, 3))
    norm = nn.BatchNorm2d(6, eps=eps, affine=affine).double().eval()
    norm.running_mean.copy_(image(6, seed=3))
    norm.running_var.copy_(image(6, seed=4).abs() + 0.1)
    if affine:
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.uniform_(norm.bias, -2, 2)
    x = image(2, 4, 6, 7)
    arguments = dict(padding=1, stride=(2, 1), groups=2)
    expected = norm(F.conv2d(x, kernel, bias, **arguments))
    frozen = bn_scale_shift(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, eps
    )
    fused = fuse_conv_bn(KernelBias(kernel, bias), frozen)
    assert distance(F.conv2d(x, *fused, **arguments), expected) < EXACT


# Transform II


def test_unfuse_conv_bn_exact():
    fused = KernelBias(
        torch.tensor([6.0, -4.0]).reshape(2, 1, 1, 1), torch.tensor([7.0, 1.0])
    )
    norm = ScaleShift(torch.tensor([2.0, -0.5]), torch.tensor([1.0, 3.0]))
    conv = unfuse_conv_bn(fused, norm)
    assert conv.kernel.flatten().tolist() == [3.0, 8.0]
    assert conv.bias.tolist() == [3.0, 4.0]
    again = fuse_conv_bn(conv, norm)
    assert torch.equal(again.kernel, fused.kernel)
    assert torch.equal(again.bias, fused.bias)


def test_add_branches_exact():
    one = KernelBias(torch.ones(1, 1, 1, 2), tensor(1))
    two = KernelBias(torch.full((1, 1, 1, 2), 3.0), tensor(5))
    total = add_branches(one, two, two)
    assert total.kernel.flatten().tolist() == [7, 7]
    assert total.bias.tolist() == [11]
    assert add_branches(one) == one


def test_add_branches_is_a_sum_of_convolutions():
    branches = [kernel_bias(4, 2, (2, 3), seed=s) for s in (0, 10, 20)]
    x = image(2, 4, 5, 6)
    arguments = dict(padding=(0, 1), dilation=(2, 1), groups=2)
    expected = sum(F.conv2d(x, *b, **arguments) for b in branches)
    total = add_branches(*branches)
    assert distance(F.conv2d(x, *total, **arguments), expected) < EXACT


def test_add_branches_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match='at least one branch'):
        add_branches()
    with pytest.raises(ValueError, match=r'one shape.*1, 1.*3, 3.*pad_kerne'):
        add_branches(kernel_bias(2, 1, (3, 3)), kernel_bias(2, 1, (1, 1)))


# Transform III


def test_fuse_1x1_kxk_exact():
    first = KernelBias(tensor(1, 2, 3, 4).reshape(2, 2, 1, 1), tensor(1, -1))
    second = KernelBias(tensor(1, 0, 10, 100).reshape(1, 2, 1, 2), tensor(7))
    fused = fuse_1x1_kxk(first, second)
    assert fused.kernel.tolist() == [[[[31, 300]], [[42, 400]]]]
    assert fused.bias.tolist() == [1 - 110 + 7]


@pytest.mark.parametrize('groups', [1, 2])
def test_fuse_1x1_kxk_is_the_same_in_both_precisions(groups):
    """They go different ways."""
    first = KernelBias(image(6, 4 // groups, 1, 1), image(6))
    second = KernelBias(image(8, 6 // groups, 3, 2, seed=1), image(8, seed=2))
    double = fuse_1x1_kxk(first, second, groups)
    single = fuse_1x1_kxk(
        *(KernelBias(k.float(), b.float()) for k, b in (first, second)), groups
    )
    for found, expected in zip(single, double):
        assert found.dtype == torch.float32
        assert distance(found, expected) < SINGLE


def test_fuse_1x1_kxk_keeps_groups_apart_exact():
    first = KernelBias(tensor(2, 3).reshape(2, 1, 1, 1), tensor(1, 10))
    second = KernelBias(tensor(5, 7).reshape(2, 1, 1, 1), tensor(0, 0))
    fused = fuse_1x1_kxk(first, second, groups=2)
    assert fused.kernel.flatten().tolist() == [10, 21]
    assert fused.bias.tolist() == [5, 70]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('inside, middle, out, groups', CHANNELS)
def test_fuse_1x1_kxk_is_both_convolutions(inside, middle, out, groups, size):
    first = kernel_bias(middle, inside // groups, (1, 1))
    second = kernel_bias(out, middle // groups, size, seed=5)
    x = image(2, inside, 6, 7)
    between = F.conv2d(x, *first, groups=groups)
    pads = (2, 2, 1, 1)
    expected = F.conv2d(
        pad_with_values(between, first.bias, pads),
        *second,
        stride=(1, 2),
        groups=groups,
    )
    fused = fuse_1x1_kxk(first, second, groups)
    assert fused.kernel.shape == (out, inside // groups, *size)
    found = F.conv2d(x, *fused, stride=(1, 2), padding=(2, 1), groups=groups)
    assert distance(found, expected) < EXACT


# Transform IV


def test_concat_branches_exact():
    one = KernelBias(torch.ones(1, 1, 1, 1), tensor(1))
    two = KernelBias(torch.zeros(2, 1, 1, 1), tensor(2, 3))
    both = concat_branches(one, two)
    assert both.kernel.flatten().tolist() == [1, 0, 0]
    assert both.bias.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match='at least one branch'):
        concat_branches()


def test_concat_branches_is_depth_concatenation():
    one, two = kernel_bias(2, 3, (3, 2)), kernel_bias(5, 3, (3, 2), seed=9)
    x = image(2, 3, 5, 6)
    expected = torch.cat(
        [F.conv2d(x, *one, padding=1), F.conv2d(x, *two, padding=1)], 1
    )
    found = F.conv2d(x, *concat_branches(one, two), padding=1)
    assert distance(found, expected) < EXACT


def test_concat_branches_of_the_groups_is_the_grouped_convolution():
    groups = [kernel_bias(3, 2, (2, 3), seed=s) for s in (0, 10)]
    x = image(2, 4, 5, 6)
    expected = torch.cat(
        [F.conv2d(x[:, 2 * i : 2 * i + 2], *g) for i, g in enumerate(groups)],
        1,
    )
    found = F.conv2d(x, *concat_branches(*groups), groups=2)
    assert distance(found, expected) < EXACT


# Transform V


def test_avg_pool_kernel_exact():
    kernel = avg_pool_kernel(2, (1, 4))
    assert kernel.tolist() == [
        [[[0.25] * 4], [[0] * 4]],
        [[[0] * 4], [[0.25] * 4]],
    ]
    assert avg_pool_kernel(2, (2, 1), groups=2).flatten().tolist() == [0.5] * 4


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('size', SIZES)
def test_avg_pool_kernel_is_average_pooling(groups, size):
    x = image(2, 4, 6, 7)
    kernel = avg_pool_kernel(4, size, groups, torch.float64)
    assert kernel.shape == (4, 4 // groups, *size)
    padding = tuple(s // 2 for s in size)
    expected = F.avg_pool2d(x, size, (2, 1), padding)
    found = F.conv2d(x, kernel, stride=(2, 1), padding=padding, groups=groups)
    assert distance(found, expected) < EXACT


def test_identity_kernel_exact():
    assert identity_kernel(2).flatten().tolist() == [1, 0, 0, 1]
    grouped = identity_kernel(4, 2)
    assert grouped.shape == (4, 2, 1, 1)
    assert grouped.flatten(1).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize('groups', [1, 2, 3, 6])
def test_identity_kernel_changes_nothing(groups):
    x = image(2, 6, 3, 4)
    kernel = identity_kernel(6, groups, torch.float64)
    assert torch.equal(F.conv2d(x, kernel, groups=groups), x)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('groups', [1, 2])
def test_fuse_1x1_avg_is_a_convolution_and_a_pooling(size, groups):
    first = kernel_bias(6, 4 // groups, (1, 1))
    x = image(2, 4, 6, 7)
    between = F.conv2d(x, *first, groups=groups)
    expected = F.avg_pool2d(
        pad_with_values(between, first.bias, (2, 2, 1, 1)), size
    )
    fused = fuse_1x1_avg(first, size)
    found = F.conv2d(x, *fused, stride=size, padding=(2, 1), groups=groups)
    assert distance(found, expected) < EXACT
    # The same as Transform III with the pooling's kernel.
    pooling = avg_pool_kernel(6, size, groups, torch.float64)
    third = fuse_1x1_kxk(first, KernelBias(pooling, 0 * first.bias), groups)
    assert distance(fused.kernel, third.kernel) < EXACT
    assert distance(fused.bias, third.bias) < EXACT


# Transform VI


def test_pad_kernel_exact():
    small = torch.ones(1, 1, 1, 1)
    centred = [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert pad_kernel(small, (3, 3))[0, 0].tolist() == centred
    assert pad_kernel(small, (2, 3), (1, 2))[0, 0].tolist() == [
        [0, 0, 0],
        [0, 0, 1],
    ]
    row = torch.tensor([[[[1.0, 2.0]]]])
    assert pad_kernel(row, (2, 3), (0, 1))[0, 0].tolist() == [
        [0, 1, 2],
        [0, 0, 0],
    ]


@pytest.mark.parametrize(
    'small, large, offset, padding',
    [
        ((1, 1), (3, 3), None, (1, 1)),
        ((3, 1), (3, 5), None, (0, 2)),
        ((1, 3), (5, 3), None, (2, 0)),
        ((1, 1), (4, 4), (1, 2), None),
        ((2, 1), (3, 4), (1, 0), None),
    ],
)
def test_pad_kernel_is_the_small_convolution(small, large, offset, padding):
    kernel = kernel_bias(4, 2, small).kernel
    x = image(2, 4, 7, 8)
    found = F.conv2d(x, pad_kernel(kernel, large, offset), groups=2)
    row, column = offset or padding
    inner = x[
        ...,
        row : x.shape[2] - (large[0] - small[0] - row),
        column : x.shape[3] - (large[1] - small[1] - column),
    ]
    assert distance(found, F.conv2d(inner, kernel, groups=2)) < EXACT


def test_pad_kernel_in_the_middle_of_an_even_kernel_exact():
    """Of two middle taps the first, as ``padding='same'`` has it."""
    one = torch.ones(1, 1, 1, 1)
    found = pad_kernel(one, (2, 4))
    assert found.tolist() == [[[[0, 1, 0, 0], [0, 0, 0, 0]]]]
    assert pad_kernel(one, (3, 2)).tolist() == [[[[0, 0], [1, 0], [0, 0]]]]


def test_pad_kernel_refuses_what_does_not_fit():
    small = torch.ones(1, 1, 3, 3)
    with pytest.raises(ValueError, match=r'\(3, 3\).*does not fit.*\(2, 5\)'):
        pad_kernel(small, (2, 5))
    with pytest.raises(ValueError, match=r'offset \(3, 0\) does not fit'):
        pad_kernel(small, (5, 5), (3, 0))


# What holds for all of them


def calls(dtype=torch.float64, groups=2):
    """Every transformation on small random tensors of a dtype."""

    def make(*shape, seed=0):
        return image(*shape, seed=seed, dtype=dtype)

    first = KernelBias(make(4, 2, 1, 1), make(4, seed=1))
    second = KernelBias(make(6, 2, 2, 3, seed=2), make(6, seed=3))
    norm = [make(6, seed=s) for s in (4, 5, 6, 7)]
    norm[1] = norm[1].abs() + 0.5
    return {
        bn_scale_shift: (lambda *n: bn_scale_shift(*n, 1e-3), norm),
        fuse_conv_bn: (
            lambda k, b, s, t: fuse_conv_bn(
                KernelBias(k, b), ScaleShift(s, t)
            ),
            [*second, norm[0], norm[1]],
        ),
        add_branches: (
            lambda k, b, m, c: add_branches(
                KernelBias(k, b), KernelBias(m, c)
            ),
            [*second, 2 * second.kernel, 3 * second.bias],
        ),
        fuse_1x1_kxk: (
            lambda k, b, m, c: fuse_1x1_kxk(
                KernelBias(k, b), KernelBias(m, c), groups
            ),
            [*first, *second],
        ),
        concat_branches: (
            lambda k, b: concat_branches(KernelBias(k, b), KernelBias(k, b)),
            [*second],
        ),
        fuse_1x1_avg: (
            lambda k, b: fuse_1x1_avg(KernelBias(k, b), (2, 3)),
            [*first],
        ),
        pad_kernel: (
            lambda k: pad_kernel(k, (4, 5), (1, 0)),
            [second.kernel],
        ),
    }


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('function', calls(), ids=lambda f: f.__name__)
def test_keeps_the_dtype(function, dtype):
    call, arguments = calls(dtype)[function]
    found = call(*arguments)
    found = [found] if isinstance(found, torch.Tensor) else found
    assert all(t.dtype == dtype for t in found)
    exact = call(*[a.double() for a in arguments])
    exact = [exact] if isinstance(exact, torch.Tensor) else exact
    for a, b in zip(found, exact):
        # A few roundings of numbers of the result's size.
        assert distance(a, b) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize('dtype', DTYPES)
def test_made_kernels_have_the_dtype_asked_for(dtype):
    assert avg_pool_kernel(2, (3, 3), 1, dtype).dtype == dtype
    assert identity_kernel(2, 2, dtype).dtype == dtype


@pytest.mark.parametrize('function', calls(), ids=lambda f: f.__name__)
def test_stays_on_the_device(function):
    call, arguments = calls()[function]
    found = call(*[a.to('meta') for a in arguments])
    found = [found] if isinstance(found, torch.Tensor) else found
    assert all(t.device.type == 'meta' for t in found)
    assert avg_pool_kernel(2, (2, 2), device='meta').device.type == 'meta'


@pytest.mark.parametrize('function', calls(), ids=lambda f: f.__name__)
def test_is_differentiable(function):
    call, arguments = calls()[function]
    arguments = [a.clone().requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(call, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('function', calls(), ids=lambda f: f.__name__)
def test_is_the_same_on_a_gpu(function):
    call, arguments = calls()[function]
    expected = call(*arguments)
    found = call(*[a.cuda() for a in arguments])
    if isinstance(found, torch.Tensor):
        expected, found = [expected], [found]
    for a, b in zip(found, expected):
        assert a.is_cuda
        assert distance(a.cpu(), b) < EXACT
