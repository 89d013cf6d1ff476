"""Every registered branch against a plain convolution, on any geometry."""

import copy

import pytest
import torch
from helpers import (
    EXACT,
    SINGLE,
    assert_same,
    distance,
    every_batch_is_large,
    geometries,
    image,
    plain_conv,
    randomize,
    state,
)
from hypothesis import assume, event, given, settings
from registered import branches_of_pictures
from torch import nn

from mmdbb.blocks import BranchSumConv2d
from mmdbb.branches import Branch, IdentityConv1x1, PointwiseKxK, build_branch
from mmdbb.geometry import ConvSpec
from mmdbb.registry import BRANCHES
from mmdbb.transforms import identity_kernel

NAMES = branches_of_pictures()


def build(name, arguments, dtype=torch.float64, seed=0, **options):
    cfg = dict(type=name, **options)
    branch = build_branch(cfg, ConvSpec(**arguments)).to(dtype)
    # Kernels have their own random start.
    return randomize(branch, seed).eval()


def supports(name, arguments):
    return BRANCHES.get(name).supports(ConvSpec(**arguments))


def merged(branch):
    return plain_conv(branch.spec, *branch.equivalent_kernel_bias())


def test_the_names_of_the_issue_are_registered():
    expected = {'kxk', '1x1', '1x1_kxk', '1x1_avg', 'kx1', '1xk', 'identity'}
    assert expected <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
@given(case=geometries())
@settings(max_examples=40)
def test_branch_is_its_merged_convolution(name, case):
    arguments, shape = case
    if not supports(name, arguments):  # as the identity most geometries
        arguments = dict(
            arguments, stride=1, out_channels=arguments['in_channels']
        )
    assume(supports(name, arguments))
    spec = ConvSpec(**arguments)
    event(f'{name}: {spec.padding_mode}')
    branch = build(name, arguments)
    kernel, bias = branch.equivalent_kernel_bias()
    assert kernel.shape == spec.kernel_shape
    assert bias.shape == (spec.out_channels,)
    x = image(*shape)
    assert distance(merged(branch)(x), branch(x)) < EXACT


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('padding', [0, 1, 2, 3])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_border_and_groups(name, padding, groups):
    """The common geometry, each border pixel looked at by itself."""
    branch = build(
        name,
        dict(
            in_channels=4,
            out_channels=4,
            kernel_size=3,
            padding=padding,
            groups=groups,
        ),
    )
    x = image(2, 4, 5, 7)
    expected, found = branch(x), merged(branch)(x)
    assert distance(found, expected) < EXACT
    for edge in (
        (..., 0, slice(None)),
        (..., -1, slice(None)),
        (..., slice(None), 0),
        (..., slice(None), -1),
    ):
        assert distance(found[edge], expected[edge]) < EXACT


@pytest.mark.parametrize('name', NAMES)
def test_branch_in_float32(name):
    arguments = dict(
        in_channels=8, out_channels=8, kernel_size=3, padding=1, groups=2
    )
    branch = build(name, arguments, torch.float32)
    x = image(2, 8, 9, 11, dtype=torch.float32)
    assert distance(merged(branch)(x), branch(x)) < SINGLE


@pytest.mark.parametrize('name', NAMES)
def test_kernel_is_differentiable_in_every_parameter(name):
    branch = build(
        name,
        dict(in_channels=4, out_channels=4, kernel_size=3, groups=2),
    )
    names = [n for n, _ in branch.named_parameters()]
    values = tuple(p.detach().clone() for p in branch.parameters())

    def compose(*parameters):
        branch.forward = branch.equivalent_kernel_bias
        return tuple(
            torch.func.functional_call(
                branch, dict(zip(names, parameters)), ()
            )
        )

    values = [v.requires_grad_() for v in values]
    assert torch.autograd.gradcheck(compose, values)


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('name', NAMES)
def test_trains_in_a_block_as_the_literal_sum(name, groups):
    """However fast: values, gradients and running statistics."""
    block = BranchSumConv2d(
        4, 4, 3, padding=1, groups=groups, branches=['kxk', name]
    )
    block = randomize(block.double()).train()
    twin = copy.deepcopy(block)
    x, y = (image(3, 4, 9, 10).requires_grad_() for _ in range(2))
    with every_batch_is_large():
        a, b = block(x), twin.forward_branches(y)
    (a * image(*a.shape, seed=1)).sum().backward()
    (b * image(*b.shape, seed=1)).sum().backward()
    assert_same(state(block, a, x.grad), state(twin, b, y.grad))


@pytest.mark.parametrize('name', NAMES)
def test_last_norm_scales_the_branch(name):
    branch = build(
        name, dict(in_channels=4, out_channels=4, kernel_size=3, padding=1)
    )
    assert branch.last_norm is not None
    with torch.no_grad():
        branch.last_norm.weight.zero_()
        branch.last_norm.bias.zero_()
    assert branch(image(2, 4, 5, 6)).abs().max() == 0


@pytest.mark.parametrize('name', NAMES)
def test_unsupported_geometry_is_an_error_that_says_so(name):
    spec = ConvSpec(4, 6, 1, stride=2)
    if BRANCHES.get(name).supports(spec):
        assert name not in ('identity', '1x1', '1x1_avg', 'kx1', '1xk')
        build_branch(name, spec)
        return
    assert name not in ('kxk', '1x1_kxk', 'orepa')
    with pytest.raises(ValueError, match=f"branch '{name}' needs .*, got"):
        build_branch(name, spec)


@pytest.mark.parametrize('name', NAMES)
def test_no_norm_stands_behind_a_convolution(name):
    """mmcv's fuse_conv_bn would fuse them, across a padded border."""
    branch = build(name, dict(in_channels=4, out_channels=4, kernel_size=3))
    children = list(branch.children())
    first_conv = min(
        (i for i, c in enumerate(children) if isinstance(c, nn.Conv2d)),
        default=len(children),
    )
    assert not any(
        isinstance(c, nn.BatchNorm2d) for c in children[first_conv:]
    )


def test_every_branch_is_documented_and_a_branch():
    for name in NAMES:
        branch = BRANCHES.get(name)
        assert issubclass(branch, Branch)
        assert branch.__doc__


def test_unknown_branch_lists_the_known():
    with pytest.raises(ValueError, match="unknown branch '3x3'.*'1x1_avg'"):
        build_branch('3x3', ConvSpec(4, 4, 3))


def test_unknown_key_lists_the_allowed():
    cfg = dict(type='1x1_kxk', internal=3)
    with pytest.raises(TypeError, match="'internal'.*'internal_channels'"):
        build_branch(cfg, ConvSpec(4, 4, 3))
    allowed = r"allowed: \['type', 'norm', 'kernel_size', 'dilation'\]"
    with pytest.raises(TypeError, match=allowed):
        build_branch(dict(type='kxk', width=3), ConvSpec(4, 4, 3))


@pytest.mark.parametrize('cfg', [3, None, dict(), dict(type=nn.Conv2d)])
def test_what_is_no_branch(cfg):
    with pytest.raises(TypeError, match='a branch is a name or a dict'):
        build_branch(cfg, ConvSpec(4, 4, 3))


# 1x1_kxk


def test_internal_channels_default():
    dense = PointwiseKxK(ConvSpec(4, 8, 3))
    assert isinstance(dense.conv1, IdentityConv1x1)
    assert dense.conv2.in_channels == 4
    grouped = PointwiseKxK(ConvSpec(4, 8, 3, groups=2))
    assert isinstance(grouped.conv1, IdentityConv1x1)
    depthwise = PointwiseKxK(ConvSpec(4, 4, 3, groups=4))
    assert depthwise.conv2.in_channels == 8
    assert isinstance(depthwise.conv1, nn.Conv2d)


def test_only_depthwise_is_twice_as_wide_inside():
    """In the paper's code: where there are as many groups as outputs."""
    for outside, width in ((4, 8), (8, 4), (12, 4)):
        spec = ConvSpec(4, outside, 3, groups=4)
        branch = build_branch('1x1_kxk', spec)
        assert branch.kernel1.shape == (width, 1, 1, 1)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_1x1_starts_as_the_identity(groups):
    branch = PointwiseKxK(
        ConvSpec(4, 8, 3, groups=groups), internal_channels=4
    )
    expected = identity_kernel(4, groups)
    assert torch.equal(branch.conv1.kernel.detach(), expected)
    x = image(2, 4, 3, 5, dtype=torch.float32)
    assert torch.equal(branch.conv1(x), x)
    assert branch.conv1.weight.abs().max() == 0


def test_identity_kernel_is_no_conv2d():
    """So that rules that initialise convolutions pass it by."""
    assert not isinstance(IdentityConv1x1(4), nn.Conv2d)


@pytest.mark.parametrize('width', [0, -4, 3, 2.0, '4'])
def test_bad_internal_channels(width):
    with pytest.raises(ValueError, match='positive multiple of groups=2'):
        PointwiseKxK(ConvSpec(4, 4, 3, groups=2), internal_channels=width)
    with pytest.raises(ValueError, match='multiple of groups=1, got True'):
        PointwiseKxK(ConvSpec(4, 4, 3), internal_channels=True)


@pytest.mark.parametrize('width', [2, 4, 6, 10])
@pytest.mark.parametrize('groups', [1, 2])
def test_internal_channels(width, groups):
    branch = build(
        '1x1_kxk',
        dict(
            in_channels=4,
            out_channels=6,
            kernel_size=(2, 3),
            padding=1,
            groups=groups,
        ),
        internal_channels=width,
    )
    x = image(2, 4, 5, 6)
    assert distance(merged(branch)(x), branch(x)) < EXACT


# 1x1_avg


def test_depthwise_pooling_stands_alone():
    names = [
        n
        for n, _ in build(
            '1x1_avg',
            dict(in_channels=4, out_channels=4, kernel_size=3, groups=4),
        ).named_children()
    ]
    assert names == ['norm2']
