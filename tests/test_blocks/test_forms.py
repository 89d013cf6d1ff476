"""Blocks for lines, volumes and videos, and transposed ones.

Geometry and algebra are those of pictures; here each form is its merged
convolution of torch, and a picture seen as a thin volume.
"""

import copy
import pickle

import pytest
import torch
from helpers import (
    SINGLE,
    assert_same,
    distance,
    every_batch_is_large,
    image,
    randomize,
    state,
)
from registered import starts_plain
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb import load_plain_weights_, reparameterize
from mmdbb.blocks import (
    ACB,
    DBB,
    ACB3d,
    BranchSumConv2d,
    DBB1d,
    DBB3d,
    DBBTranspose2d,
    DilatedReparamConv3d,
    OREPAConv,
    OREPAConv3d,
    RepVGGConv,
    RepVGGConv1d,
)
from mmdbb.blocks.build import form_of, kind_of_block, registered_blocks
from mmdbb.dimensions import CONV_TYPES, NORM_TYPES, LayerKind
from mmdbb.modules import memory_format_of
from mmdbb.reparam import literal_forward
from mmdbb.scale_norm import ScaleNorm

EXACT = 1e-12
FLAT = LayerKind(2)
FORMS = {
    name: kind
    for name, kind in registered_blocks(None).items()
    if kind_of_block(kind) != FLAT
}
EACH = pytest.mark.parametrize('kind', FORMS.values(), ids=FORMS)
SIZES = {1: (9,), 2: (7, 9), 3: (4, 6, 7)}


def x_of(kind, channels=4, seed=0, dtype=torch.float64):
    return image(2, channels, *SIZES[kind.dims], seed=seed, dtype=dtype)


def build(kind, *args, **kwargs):
    block = kind(*args, **kwargs).double()
    return randomize(block).eval()


def size_of(kind):
    """A kernel that has room for the small ones of large kernels."""
    return 5 if kind.kernel_sizes[0] > 3 else 3


GEOMETRIES = (
    dict(padding=1),
    dict(padding=0, stride=2, groups=2),
    dict(padding=2, dilation=2),
    dict(padding=3, stride=2, groups=4, dilation=2),
    dict(padding=1, padding_mode='circular'),
)


def test_there_are_forms_of_all_kinds():
    assert {kind_of_block(kind) for kind in FORMS.values()} == {
        kind for kind in CONV_TYPES if kind != FLAT
    }
    for name, kind in registered_blocks().items():
        for dims in (1, 3):
            if (name, dims) == ('ACB', 1):
                continue  # its one direction is the kernel's own
            if name == 'LinearAdd':
                continue  # RepOptimizer's search is of images
            assert form_of(kind, LayerKind(dims)).__name__ == (
                f'{kind.__name__}{dims}d'
            )


@pytest.mark.parametrize('number', range(len(GEOMETRIES)))
@EACH
def test_form_is_its_merged_convolution(kind, number):
    geometry = dict(GEOMETRIES[number])
    if kind.transposed and geometry.pop('padding_mode', None):
        geometry.update(stride=2, output_padding=1)
    size = size_of(kind)
    if number == 1:  # neither odd nor equal in all directions
        size = (size, *range(2, 4))[: kind.dims]
    args = 4, 4 if number == 3 else 6, size
    block, x = build(kind, *args, **geometry), x_of(kind)
    x = torch.cat([x, x], 2) if number in (1, 2, 3) else x
    merged = reparameterize(block)
    assert type(merged) is CONV_TYPES[kind_of_block(kind)]
    plain = CONV_TYPES[kind_of_block(kind)](*args, **geometry).double()
    assert merged.weight.shape == plain.weight.shape
    assert type(plain).extra_repr(merged) == plain.extra_repr()
    with torch.no_grad():
        expected = block.forward_branches(x)
        assert expected.shape == plain(x).shape
        assert distance(merged(x), expected) < EXACT
        assert distance(block(x), expected) < EXACT
    # With frozen norms, gradients flow through the composed kernel.
    assert distance(block(x), expected) < EXACT
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    assert {isinstance(m, NORM_TYPES[kind.dims]) for m in norms} <= {True}


THIN = (
    (DBB, DBB3d, {}),
    (DBB, DBB1d, {}),
    (ACB, ACB3d, {'kx1': '1xkx1', '1xk': '1x1xk'}),
    (RepVGGConv, RepVGGConv1d, {}),
    (OREPAConv, OREPAConv3d, {}),
)


@pytest.mark.parametrize('flat, form, names', THIN, ids=lambda v: str(v))
@pytest.mark.parametrize('stride', [1, 2])
def test_a_picture_is_a_thin_volume(flat, form, names, stride):
    """A training step, its border and statistics: those of the papers' code.

    A volume of one slice is a picture, and a picture of one row is a line.
    """
    line = form.dims == 1
    kernel, padding, step = (3, 3), (1, 1), (stride, stride)
    if line:
        kernel, padding, step = (1, 3), (0, 1), (1, stride)
    one = flat(4, 4, kernel, step, padding).double()
    randomize(one)
    if line:
        other = form(4, 4, 3, stride, 1).double()
    else:
        other = form(4, 4, (1, *kernel), (1, *step), (0, *padding)).double()
    if flat is OREPAConv:
        # The prior's channels are shared among more directions.
        other.generator.prior_pattern.copy_(
            one.generator.prior_pattern[:, None]
        )

    def renamed(name):
        for old, new in names.items():
            name = name.replace(f'.{old}.', f'.{new}.')
        return name

    own = other.state_dict()
    for name, value in one.state_dict().items():
        own[renamed(name)].copy_(value.reshape(own[renamed(name)].shape))
    x = image(2, 4, *((1, 9) if line else (6, 7)))
    thin = x[:, :, 0] if line else x[:, :, None]
    y, z = one(x), other(thin)
    z = z[:, :, None] if line else z[:, :, 0]
    assert distance(z, y) < EXACT
    weights = image(*y.shape, seed=1)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    grads = {n: p.grad for n, p in other.named_parameters()}
    largest = max(p.grad.abs().max() for p in one.parameters())
    for name, parameter in one.named_parameters():
        found = grads[renamed(name)].reshape(parameter.shape)
        assert (found - parameter.grad).abs().max() < 1e-11 * largest, name
    buffers = dict(other.named_buffers())
    for name, value in one.named_buffers():
        found = buffers[renamed(name)].reshape(value.shape)
        assert distance(found, value) < EXACT, name


@pytest.mark.parametrize(
    'kernel, stride, padding, extra',
    [(4, 2, 1, 0), (2, 2, 0, 0), (3, 2, 1, 1), ((4, 3), (2, 1), (1, 0), 0)],
)
def test_transposed_training_step(kernel, stride, padding, extra):
    """Each branch by hand; at the border a constant would be no bias."""
    block = DBBTranspose2d(4, 6, kernel, stride, padding, extra).double()
    randomize(block)
    x = x_of(DBBTranspose2d)
    geometry = dict(stride=stride, padding=padding, output_padding=extra)

    def normed(norm, y):
        own = copy.deepcopy(norm)
        return own(y)

    def up(x, weight):
        return nn.functional.conv_transpose2d(x, weight, **geometry)

    kxk, one, both = (block.branches[n] for n in ('kxk', '1x1', '1x1_kxk'))
    assert isinstance(both.norm1, ScaleNorm)
    # The tap that writes where the input's pixel stands.
    full = torch.zeros_like(kxk.conv.weight)
    tap = tuple(
        min((k // 2, (k - 1) // 2), key=lambda t, p=p: abs(t - p))
        for k, p in zip(block.kernel_size, block.padding)
    )
    full[:, :, tap[0], tap[1]] = one.conv.weight[:, :, 0, 0].detach()
    square = both.conv1(x).square().mean((0, 2, 3))
    first = both.conv1(x) / (square + 1e-5).sqrt().reshape(-1, 1, 1)
    first = first * both.norm1.weight.reshape(-1, 1, 1)
    expected = (
        normed(kxk.norm, up(x, kxk.conv.weight))
        + normed(one.norm, up(x, full))
        + normed(both.norm2, up(first, both.conv2.weight))
    )
    assert distance(block(x), expected) < EXACT


SUMS = {
    name: kind
    for name, kind in FORMS.items()
    if issubclass(kind, BranchSumConv2d) and not kind.transposed
}


@pytest.mark.parametrize('number', [0, 1, 3])
@pytest.mark.parametrize('kind', SUMS.values(), ids=SUMS)
def test_a_fast_training_step_is_the_literal_one(kind, number):
    """Output, every gradient and every statistic, as of pictures."""
    args = 4, 4 if number == 3 else 6, size_of(kind)
    block = randomize(kind(*args, **GEOMETRIES[number]).double())
    x = torch.cat([x_of(kind)] * 2, -1)  # large enough to collapse
    x = torch.cat([x] * 2, 2).requires_grad_()
    twin, same = copy.deepcopy(block), x.detach().clone().requires_grad_()
    weights = image(*block.eval()(x).shape, seed=1)
    block.train()
    with every_batch_is_large():
        y = block(x)
        (y * weights).sum().backward()
    with literal_forward(twin):
        expected = twin(same)
        (expected * weights).sum().backward()
    assert distance(y, expected) < EXACT
    assert distance(x.grad, same.grad) < 1e-11
    assert_same(state(block), state(twin))


def test_transposed_takes_an_output_size():
    x = x_of(DBBTranspose2d)
    block = build(DBBTranspose2d, 4, 6, 3, stride=2, padding=1)
    merged, plain = reparameterize(block), nn.ConvTranspose2d(4, 6, 3, 2, 1)
    for size in ((13, 17), (14, 18), (13, 18), (2, 6, 14, 17)):
        with torch.no_grad():
            y = block(x, output_size=size)
            assert y.shape == plain(x.float(), size).shape
            assert distance(merged(x, size), y) < EXACT
            # The cached kernel knows no size; branch by branch it is told.
            training = copy.deepcopy(block).train()
            assert training(x, size).shape == y.shape
            with literal_forward(nn.Sequential(block)):
                assert distance(block(x, size), y) < EXACT
    for wrong in ((15, 17), (17,), (12, 17)):
        with pytest.raises(ValueError, match='output_size must be a size'):
            block(x, wrong)
    block.switch_to_deploy()
    assert block(x, (14, 18)).shape[2:] == (14, 18)
    with pytest.raises(TypeError, match='nn.Conv2d, which takes no output_si'):
        DBB(4, 6, 3)(x.float(), (5, 7))


def test_small_dilated_kernels_merge_in_any_form():
    inner = ['kxk', dict(type='kxk', kernel_size=3, dilation=2), '1x1']
    for kind in (DBB1d, DBB3d, DBBTranspose2d):
        block = build(kind, 4, 6, 5, stride=2, padding=1, branches=inner)
        x = torch.cat([x_of(kind)] * 2, -1)
        x = torch.cat([x] * 2, 2)
        with torch.no_grad():
            expected = block.forward_branches(x)
            assert distance(reparameterize(block)(x), expected) < EXACT
        assert 'kxk_k3_d2' in block.branches
    names = DilatedReparamConv3d(4, 4, 5, groups=4).branches
    assert list(names) == ['kxk', 'kxk_k3', 'kxk_k3_d2']


@EACH
def test_a_form_is_a_layer_of_torch(kind):
    """Its attributes, copies, files, norms and precisions."""
    size, dims = size_of(kind), kind.dims
    block, x = kind(4, 4, size, padding=size // 2), x_of(kind).float()
    plain = CONV_TYPES[kind_of_block(kind)](4, 4, size, padding=size // 2)
    for name in ('kernel_size', 'stride', 'padding', 'output_padding'):
        assert getattr(block, name) == getattr(plain, name), name
    assert block.transposed == plain.transposed
    assert block(x).shape == plain(x).shape
    block(x)
    block.eval()
    with torch.no_grad():
        y = block(x)
        assert distance(block(x[0]), y[0]) < SINGLE
        assert block.weight.shape == plain.weight.shape
        copied = pickle.loads(pickle.dumps(copy.deepcopy(block)))
        assert torch.equal(copied(x), y)
        other = kind(4, 4, size, padding=size // 2).eval()
        other.load_state_dict(block.state_dict(), strict=True)
        assert torch.equal(other(x), y)
        other.reset_parameters()
        assert not torch.equal(other(x), y)
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(copied)
        assert distance(synced(x), y) < SINGLE
        if starts_plain(kind):
            load_plain_weights_(other, plain.state_dict())
            assert distance(other(x), plain(x)) < SINGLE
            block.load_state_dict(dict(plain.state_dict()))
            assert distance(block(x), plain(x)) < SINGLE
    if dims == 3 and isinstance(block, DBB):
        last = torch.channels_last_3d
        block.eval().to(memory_format=last)
        assert memory_format_of(reparameterize(block)) is last


@pytest.mark.parametrize('kind', [DBB3d, DBBTranspose2d])
def test_compiled(kind):
    block, x = build(kind, 4, 6, 3, padding=1, stride=2).train(), x_of(kind)
    twin = copy.deepcopy(block)
    with every_batch_is_large():
        compiled = torch.compile(block, backend='eager', fullgraph=True)
        assert distance(compiled(x), twin(x)) < EXACT
    for found, expected in zip(block.buffers(), twin.buffers()):
        assert torch.allclose(found, expected, atol=EXACT)


@pytest.mark.parametrize('kind', [DBB1d, DBB3d, DBBTranspose2d])
def test_autocast(kind):
    block, x = kind(4, 6, 3, padding=1, stride=2), x_of(kind).float()
    with torch.autocast('cpu', torch.bfloat16), every_batch_is_large():
        y = block(x)
    y.float().square().mean().backward()
    assert y.dtype is torch.bfloat16
    for parameter in block.parameters():
        assert parameter.dtype is torch.float32
        assert parameter.grad.isfinite().all()
    block.eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        half = block(x)
    with torch.no_grad():
        assert distance(half, block(x)) < 0.02


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: DBB(4, 6, (3, 3, 3)), 'not for an nn.Conv3d, as DBB3d does'),
        (lambda: DBB3d(4, 6, (3, 3)), 'stands for an nn.Conv3d, not for an'),
        (lambda: DBB1d(4, 6, (3, 3)), 'kernel_size must be 1 numbers or one'),
        (lambda: DBB3d(4, 6, 3, stride=(1, 2)), 'stride must be one or three'),
        (lambda: DBB1d(4, 6, 3)(torch.rand(2, 4, 5, 6)), r'\(N, C, L\)'),
        (lambda: DBB3d(4, 6, 3)(torch.rand(4, 5, 6)), r'\(N, C, T, H, W\)'),
        (lambda: DBB(4, 6, 3)(torch.rand(2, 4, 9)), 'stands for an nn.Conv2d'),
        (
            lambda: DBB3d(4, 6, 3, padding='adaptive'),
            'of two dimensions; got dims=3',
        ),
        (
            lambda: DBB(4, 6, 3, output_padding=1),
            'output_padding is of transposed convolutions',
        ),
        (
            lambda: DBBTranspose2d(4, 6, 3, padding='same'),
            "numbers of pixels, got 'same'",
        ),
        (
            lambda: DBBTranspose2d(4, 6, 3, padding_mode='reflect'),
            "must be 'zeros', got 'reflect'",
        ),
        (
            lambda: DBBTranspose2d(4, 6, 3, 2, output_padding=2),
            'output_padding must be less than',
        ),
        (
            lambda: DBBTranspose2d(4, 6, 3, branches=['1x1_avg']),
            "'1x1_avg' needs .* not transposed",
        ),
        (
            lambda: DBBTranspose2d(4, 6, 3, branches=['orepa']),
            "'orepa' needs a convolution that is not transposed",
        ),
        (lambda: ACB3d(4, 6, 3, branches=['kx1']), "branch 'kx1' needs"),
        (
            lambda: DBB3d(4, 6, (3, 1, 1), branches=['kx1x1']),
            'its direction and in another',
        ),
        (
            lambda: DBB1d(4, 6, 3, norm_cfg=dict(type='BN2d')),
            'does not take images of dims=1',
        ),
        (lambda: form_of(ACB, LayerKind(1)), 'ACB has no form for an nn.Conv'),
        (
            lambda: form_of(OREPAConv, LayerKind(2, True)),
            'no form for an nn.ConvTranspose2d. A subclass of OREPAConv with',
        ),
    ],
)
def test_what_no_form_is_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_geometry_can_change_after_building():
    block = build(DBB3d, 4, 6, 3, padding=1)
    block.stride, block.dilation, block.padding = (1, 2, 2), 2, (2, 2, 2)
    x = x_of(DBB3d)
    with torch.no_grad():
        expected = block.forward_branches(x)
        assert distance(reparameterize(block)(x), expected) < EXACT
    assert expected.shape[2:] == (4, 3, 4)
    block = build(DBBTranspose2d, 4, 6, 3, stride=2)
    block.output_padding = (1, 0)
    x = x_of(DBBTranspose2d)
    with torch.no_grad():
        expected = block.forward_branches(x)
        assert distance(reparameterize(block)(x), expected) < EXACT


def test_blocks_from_before_there_were_forms_are_read():
    block, x = build(DBB, 4, 4, 3, padding=1), image(2, 4, 5, 6)
    old = copy.deepcopy(block)
    for module in old.modules():
        if hasattr(module, 'spec'):
            for name in ('dims', 'transposed', 'output_padding'):
                vars(module.spec).pop(name, None)
        for name in ('dims', 'kernel_size', 'stride', 'dilation', 'padding'):
            if type(module).__name__ == 'IdentityConv1x1':
                vars(module).pop(name, None)
    found = pickle.loads(pickle.dumps(old))
    assert torch.equal(found(x), block(x))
    assert distance(reparameterize(found)(x), block(x)) < EXACT
