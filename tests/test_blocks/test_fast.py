"""The fast forward pass against the literal sum of branches."""

import copy

import pytest
import torch
from helpers import EXACT, distance, geometries, image, randomize
from hypothesis import HealthCheck, given, settings
from mmcv.cnn import build_conv_layer
from registered import blocks, sums_branches
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmdbb import DBB
from mmdbb.blocks import BranchSumConv2d, fast
from mmdbb.blocks.fast import fast_forward
from mmdbb.branches.moments import Maps, moments_of
from mmdbb.branches.norm import batch_scale_shift
from mmdbb.geometry import ConvSpec

#: Sums that no preset has.
OTHERS = dict(
    # The input itself comes first, and a norm behind padded borders.
    normed=lambda *a, **k: BranchSumConv2d(
        *a, branches=_with_identity(*a, **k), sum_norm=True, **k
    ),
    wide=lambda *a, **k: BranchSumConv2d(
        *a,
        branches=['kxk', dict(type='1x1_kxk', internal_channels=12)],
        **k,
    ),
)


def _with_identity(in_channels, out_channels, stride=1, **kwargs):
    bare = dict(type='identity', norm=False)
    same = in_channels == out_channels and stride == 1
    return [*([bare] if same else []), '1x1_kxk', '1x1_avg', 'kxk']


def run(block, x, forward, seed=5):
    """Output, gradients of everything, buffers after one step."""
    x = x.clone().requires_grad_()
    y = forward(block, x)
    y.backward(image(*y.shape, seed=seed, dtype=y.dtype))
    grads = {n: p.grad for n, p in block.named_parameters()}
    found = dict(output=y, grad_input=x.grad)
    found.update({f'buffer {n}': b for n, b in block.named_buffers()})
    return found, grads


def literal(block, x):
    return block.forward_branches(x)


def assert_same(block, x, bound=EXACT, forward=fast_forward):
    reference = copy.deepcopy(block)
    found, grads = run(block, x, forward)
    expected, expected_grads = run(reference, x, literal)
    for name, value in expected.items():
        assert distance(found[name], value) < bound, name
    # A gradient that is zero but for rounding is measured by its neighbours.
    scale = max(
        g.abs().max() for g in expected_grads.values() if g is not None
    )
    for name, value in expected_grads.items():
        if value is None:
            assert grads[name] is None, name
            continue
        error = (grads[name] - value).abs().max() / scale
        assert error < bound, name


CASES = [
    dict(in_channels=6, out_channels=8, kernel_size=3, padding=1),
    dict(in_channels=6, out_channels=8, kernel_size=3, padding=1, stride=2),
    dict(in_channels=6, out_channels=8, kernel_size=5, padding=2),
    dict(in_channels=6, out_channels=6, kernel_size=3, padding=1, groups=6),
    dict(in_channels=6, out_channels=12, kernel_size=3, padding=1, groups=6),
    dict(in_channels=8, out_channels=4, kernel_size=3, padding=1, groups=2),
    dict(in_channels=6, out_channels=8, kernel_size=2, padding='same'),
    dict(in_channels=6, out_channels=8, kernel_size=3, padding=0, dilation=2),
    dict(
        in_channels=6,
        out_channels=6,
        kernel_size=(2, 3),
        padding=(2, 1),
        padding_mode='reflect',
        groups=6,
    ),
    dict(
        in_channels=6,
        out_channels=8,
        kernel_size=3,
        padding=2,
        padding_mode='circular',
    ),
]


@pytest.mark.parametrize('kwargs', CASES, ids=str)
@pytest.mark.parametrize(
    'kind',
    [
        *blocks(sums_branches),
        *(pytest.param(kind, id=name) for name, kind in OTHERS.items()),
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_fast_equals_literal(kind, kwargs, training):
    block = randomize(kind(**kwargs)).double().train(training)
    assert_same(block, image(3, kwargs['in_channels'], 9, 11))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(geometries())
def test_fast_equals_literal_property(geometry):
    kwargs, shape = geometry
    for training in (True, False):
        block = randomize(DBB(**kwargs)).double().train(training)
        y = block.forward_branches(image(*shape)) if not training else None
        if y is not None and not y.numel():
            return
        try:
            copy.deepcopy(block).forward_branches(image(*shape))
        except ValueError:  # one value a channel: no batch statistics
            return
        assert_same(block, image(*shape))


@pytest.mark.parametrize('channels, size', [(4, 12), (16, 12), (48, 5)])
def test_both_sides_of_the_size_rule(channels, size):
    """A small image keeps the 1x1; a large one gets a composed kernel."""
    for training in (True, False):
        block = DBB(channels, channels, 3, padding=1)
        block = randomize(block).double().train(training)
        assert_same(block, image(2, channels, size, size + 1))


@pytest.mark.parametrize('offset', [0, 1])
def test_float32_is_as_exact_as_the_literal_sum(offset):
    block = randomize(DBB(16, 16, 3, padding=1))
    x = image(4, 16, 20, 20, dtype=torch.float32) + offset
    exact, _ = run(copy.deepcopy(block).double(), x.double(), literal)
    plain, _ = run(copy.deepcopy(block), x, literal)
    found, _ = run(block, x, fast_forward)
    for name in ('output', 'grad_input'):
        ours = distance(found[name], exact[name])
        theirs = distance(plain[name], exact[name])
        assert ours < max(8 * theirs, 1e-6), name


def test_channels_last():
    block = randomize(DBB(6, 8, 3, padding=1)).double()
    x = image(3, 6, 9, 11).to(memory_format=torch.channels_last)
    assert_same(block, x)


@pytest.mark.parametrize('training', [True, False])
def test_without_gradients(training):
    block = randomize(DBB(6, 8, 3, padding=1)).double().train(training)
    reference = copy.deepcopy(block)
    x = image(3, 6, 9, 11)
    with torch.no_grad():
        assert distance(block(x), reference.forward_branches(x)) < EXACT
    for (name, a), b in zip(block.named_buffers(), reference.buffers()):
        assert distance(a, b) < EXACT, name


def test_cumulative_momentum():
    block = randomize(DBB(6, 8, 3, padding=1)).double()
    for norm in block.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = None
            norm.num_batches_tracked.fill_(2)
    assert_same(block, image(3, 6, 9, 11))


def test_norms_without_affine():
    norm_cfg = dict(type='BN', affine=False)
    for training in (True, False):
        block = DBB(6, 8, 3, padding=1, norm_cfg=norm_cfg)
        block = randomize(block).double().train(training)
        assert_same(block, image(3, 6, 9, 11))


def test_mixed_modes_and_frozen_parameters():
    block = randomize(DBB(6, 8, 3, padding=1)).double()
    block.branches['kxk'].norm.eval()
    assert_same(block, image(3, 6, 9, 11))
    block = randomize(DBB(6, 8, 3, padding=1)).double().eval()
    for norm in block.modules():
        if isinstance(norm, _BatchNorm):
            norm.requires_grad_(False)
    assert_same(block, image(3, 6, 9, 11))


@pytest.mark.parametrize(
    'name', ['1x1.norm', '1x1_avg.norm1', '1x1_kxk.norm1', '1x1_kxk.norm2']
)
@pytest.mark.parametrize('training', [True, False])
def test_one_frozen_norm_among_others(name, training):
    """Or one that is not: each uses the statistics of its own mode."""
    block = randomize(DBB(6, 8, 3, padding=1)).double().train(training)
    norm = block.branches.get_submodule(name)
    norm.train(not training)
    before = norm.running_mean.clone()
    assert_same(block, image(3, 6, 9, 11))
    assert torch.equal(norm.running_mean, before) == training


@pytest.mark.parametrize('groups', [1, 6])
@pytest.mark.parametrize('reentrant', [True, False])
def test_gradient_checkpointing(groups, reentrant):
    block = DBB(6, 6, 3, padding=1, groups=groups)
    block = randomize(block).double()

    def checkpointed(block, x):
        return checkpoint(block, x, use_reentrant=reentrant)

    assert_same(block, image(3, 6, 9, 11), forward=checkpointed)


def test_a_hook_inside_a_branch_is_called():
    block = DBB(6, 8, 3, padding=1)
    seen = []
    handle = block.branches['1x1'].conv.register_forward_hook(
        lambda *args: seen.append(args[2].shape)
    )
    block(torch.rand(2, 6, 5, 7))
    assert seen == [(2, 8, 5, 7)]
    handle.remove()


CHANGES = dict(
    data=lambda p: p.data.add_(1),
    in_place=lambda p: p.add_(1),
    set_=lambda p: p.set_(p + 1),
    swap=lambda p: setattr(p, 'data', p.data + 1),
)


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('branch', ['kxk', '1x1_kxk', '1x1_avg'])
def test_the_kept_kernel_is_never_stale(change, branch):
    block = randomize(DBB(6, 8, 3, padding=1)).double().eval()
    x = image(2, 6, 5, 7)
    with torch.no_grad():
        before = block(x)
        assert block._cached_kernel is not None
        norm = block.branches[branch].last_norm
        for tensor in (norm.weight, norm.running_mean):
            CHANGES[change](tensor)
            after = block(x)
            assert distance(after, before) > 1e-3
            assert distance(after, block.forward_branches(x)) < EXACT
            before = after


def test_the_kept_kernel_follows_loading_and_moving():
    block = randomize(DBB(6, 8, 3, padding=1)).eval()
    other = randomize(DBB(6, 8, 3, padding=1), seed=1).eval()
    x = image(2, 6, 5, 7, dtype=torch.float32)
    with torch.no_grad():
        block(x)
        block.load_state_dict(other.state_dict())
        assert distance(block(x), other.forward_branches(x)) < 1e-5
        block.double()
        y = block(x.double())
        assert y.dtype == torch.float64
        assert distance(y, block.forward_branches(x.double())) < EXACT
    assert copy.deepcopy(block)._cached_kernel is None
    assert block._cached_kernel is not None


@pytest.mark.parametrize('groups', [1, 6])
def test_bytes_kept_for_backward(groups):
    """What each pass keeps, counted in activations of the input's size."""

    def kept(forward):
        block = DBB(6, 6, 3, padding=1, groups=groups)
        x = torch.rand(8, 6, 32, 32, requires_grad=True)
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forward(block, x)
        unit = x.numel() * x.element_size()
        return sum(size for size, _ in storages.values()) / unit

    assert kept(literal) > 8
    assert kept(fast_forward) < (3.5 if groups == 1 else 1.5)


def test_moments_exact():
    x = torch.tensor([[1.0, 3.0], [2.0, 6.0]]).reshape(1, 2, 1, 2)
    mean, cov, count = moments_of(x, 1)
    assert count == 2
    assert mean.tolist() == [[2, 4]]
    assert cov.tolist() == [[[1, 2], [2, 4]]]
    weight = torch.tensor([[1.0, -1.0]]).reshape(1, 2, 1, 1)
    mean, var, _ = moments_of(x, 1).through(weight)
    assert (mean.item(), var.item()) == (-2, 1)


def test_moments_keep_their_digits_beside_a_large_mean():
    x = image(2, 4, 9, 7, dtype=torch.float32) + 1000
    cov = moments_of(x, 1).cov
    exact = moments_of(x.double(), 1).cov
    assert distance(cov, exact) < 1e-4


def test_moments_of_float32_are_rounded_as_float64():
    """The batch's mean is rounded to float32, and what that costs undone."""
    x = image(2, 4, 9, 7, dtype=torch.float32) + 1e5
    pixels = x.double().transpose(0, 1).flatten(1)
    mean, cov, _ = moments_of(x, 1)
    centred = pixels.mean(1) - 1e5
    assert (centred.float() != x.mean((0, 2, 3)) - 1e5).any()
    assert distance(mean[0] - 1e5, centred) < 1e-9
    assert distance(cov[0], torch.cov(pixels, correction=0)) < 1e-9


@pytest.mark.parametrize('groups', [1, 2])
def test_statistics_behind_a_1x1_are_those_of_its_output(groups):
    """From the covariance, and from maps that are computed and dropped."""
    x, kernel = image(3, 4, 5, 3), image(6, 4 // groups, 1, 1, seed=1)
    z = nn.functional.conv2d(x, kernel, groups=groups)
    z = z.transpose(0, 1).flatten(1)
    expected = z.mean(1), (z - z.mean(1, keepdim=True)).square().mean(1)
    for source in (moments_of(x, groups), Maps(x, groups, None)):
        mean, var, count = source.through(kernel)
        assert distance(mean, expected[0]) < EXACT
        assert distance(var, expected[1]) < EXACT
        assert count == 45


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_normalised_1x1_is_centred_beside_a_large_mean(seed):
    """Times the images' mean, what rounds a scaled kernel is a shift.

    Measured: 4e-6 at most, and 2e-5 or more if that is not undone.
    """
    block = DBB(16, 16, 3, padding=1, branches=['1x1_kxk', '1x1'])
    block, x = randomize(block, seed), image(8, 16, 24, 25, seed=seed) + 1000
    seen = []

    def noted(norm, stats):
        seen.append(norm)
        return batch_scale_shift(norm, stats)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, 'batch_scale_shift', noted)
        both = block(x.float()).double().detach()
    norm = block.branches['1x1'].norm
    assert norm in seen  # it was scaled by statistics known before
    other = block.branches['1x1_kxk'].norm2.bias
    found = both.mean((0, 2, 3)) - other.double()
    assert (found - norm.bias).abs().max() < 1e-5


def test_moments_gradient():
    x = image(2, 4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moments_of(x, 2)[:2], x)
    assert torch.autograd.gradgradcheck(lambda x: moments_of(x, 2)[:2], x)


def test_one_value_a_channel_raises_as_batch_norm_does():
    block = DBB(6, 8, 3)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        block(torch.rand(1, 6, 3, 3))


@pytest.mark.parametrize('name', ['dbb', 'normed', 'wide'])
def test_one_pixel_with_a_border_raises_as_batch_norm_does(name):
    """The output has nine values a channel, the first norms see one."""
    block = dict(OTHERS, dbb=DBB)[name](6, 8, 3, padding=2)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        block(torch.rand(1, 6, 1, 1))
    assert all(b.isfinite().all() for b in block.buffers())


def test_model_in_plain_pytorch_trains():
    torch.manual_seed(0)
    model = nn.Sequential(DBB(3, 4, 3, padding=1), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.rand(4, 3, 8, 8)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_own_init_cfg_applies_inside_a_host_that_never_asks():
    rule = dict(type='Constant', layer='Conv2d', val=0.5)
    layer = build_conv_layer(
        dict(type='DBB', init_cfg=rule, gamma_init=0.25), 4, 4, 3, padding=1
    )
    assert (layer.branches['kxk'].conv.weight == 0.5).all()
    assert (layer.branches['kxk'].norm.weight == 0.25).all()
    assert not layer.branches['1x1_kxk'].conv1.weight.any()


@pytest.mark.parametrize('padded', [True, False])
@pytest.mark.parametrize('mean', [True, False])
@pytest.mark.parametrize(
    'geometry',
    [
        dict(padding=1),
        dict(padding=(0, 2), stride=2),
        dict(padding='same'),
        dict(padding=1, padding_mode='reflect'),
    ],
    ids=str,
)
def test_two_ways_to_pool(geometry, mean, padded):
    """GPUs take the one, CPUs the other."""
    spec = ConvSpec(4, 4, (2, 3), **geometry)
    x = image(2, 4, 9, 8).requires_grad_()
    expected = fast.pool_by_convolution(x, spec, padded, mean)
    found = fast.pool_by_torch(x, spec, padded, mean)
    assert distance(found, expected) < EXACT
    grads = [
        torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)
    ]
    assert distance(*grads) < EXACT
