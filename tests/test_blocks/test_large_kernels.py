"""Blocks of large kernels, and MobileOne's, at the sizes that they are for.

At 3x3 they are sums that other blocks are too, so the tests of all blocks
leave them out (``distinct_blocks``). The papers' numbers are in
test_reference.py.
"""

import copy
import pickle

import pytest
import torch
from helpers import (
    EXACT,
    assert_same,
    distance,
    every_batch_is_large,
    image,
    randomize,
    state,
)
from mmcv.cnn import ConvModule, build_conv_layer
from torch import nn

from mmdbb import (
    DBB,
    DilatedReparamConv,
    LargeKernelConv,
    MobileOneConv,
    RepVGGConv,
    insert_blocks_,
    load_plain_weights_,
    reparameterize,
)
from mmdbb.blocks.build import registered_blocks
from mmdbb.blocks.fast import fast_forward
from mmdbb.recompute import is_recomputing

#: Depthwise kernels from 13x13 on have a forward pass of their own.
CASES = [
    (DilatedReparamConv, dict(kernel_size=7, padding=3, groups=4)),
    (DilatedReparamConv, dict(kernel_size=13, padding=6, groups=4)),
    (DilatedReparamConv, dict(kernel_size=(13, 15), padding='same', groups=4)),
    (DilatedReparamConv, dict(kernel_size=(7, 9), stride=2, dilation=2)),
    (LargeKernelConv, dict(kernel_size=9, padding=1, groups=2)),
    (LargeKernelConv, dict(kernel_size=13, padding=7, groups=4, stride=2)),
    (
        LargeKernelConv,
        dict(kernel_size=7, padding=3, padding_mode='reflect', small_kernel=3),
    ),
    (MobileOneConv, dict(kernel_size=3, padding=1, num_conv_branches=3)),
    (MobileOneConv, dict(kernel_size=3, groups=4, stride=2)),
    (MobileOneConv, dict(kernel_size=1)),
    # Other branches of a large depthwise kernel.
    (DBB, dict(kernel_size=13, padding=6, groups=4)),
    (RepVGGConv, dict(kernel_size=13, padding=6, groups=4)),
]
EACH = pytest.mark.parametrize(
    'kind, arguments',
    CASES,
    ids=[f'{kind.__name__}-{arguments}' for kind, arguments in CASES],
)
DEPTHWISE = dict(kernel_size=13, padding=6, groups=4)


def build(kind, arguments):
    return randomize(kind(4, 4, **arguments).double())


@EACH
@pytest.mark.parametrize('training', [True, False])
def test_fast_is_the_literal_sum(kind, arguments, training):
    block = build(kind, arguments).train(training)
    twin = copy.deepcopy(block)
    x, y = (image(3, 4, 21, 22).requires_grad_() for _ in range(2))
    with every_batch_is_large():
        a, b = fast_forward(block, x), twin.forward_branches(y)
    (a * image(*a.shape, seed=1)).sum().backward()
    (b * image(*b.shape, seed=1)).sum().backward()
    assert_same(state(block, a, x.grad), state(twin, b, y.grad))


@EACH
def test_merged(kind, arguments):
    block = build(kind, arguments).eval()
    x = image(2, 4, 21, 22)
    expected = block.forward_branches(x)
    conv = reparameterize(nn.Sequential(block))[0]
    assert type(conv) is nn.Conv2d
    assert distance(conv(x), expected) < EXACT
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    other = build(kind, arguments).eval()
    other.load_state_dict(block.state_dict())
    built = kind(4, 4, deploy=True, **arguments).double()
    built.load_state_dict(dict(zip(built.state_dict(), conv.parameters())))
    for found in (*copies, other, built):
        assert distance(found(x), expected) < EXACT


@pytest.mark.parametrize('kind', [DilatedReparamConv, LargeKernelConv])
def test_large_outputs_are_kept_and_small_kernels_run_again(kind):
    """In training a large depthwise kernel runs once, the others twice."""
    block, calls = build(kind, DEPTHWISE), {}
    x = image(2, 4, 14, 15).requires_grad_()
    for name, branch in block.branches.items():
        forward = branch.conv._conv_forward

        def counted(x, weight, bias, name=name, forward=forward):
            calls.setdefault(name, []).append(is_recomputing())
            return forward(x, weight, bias)

        branch.conv._conv_forward = counted
    with every_batch_is_large():
        fast_forward(block, x).sum().backward()
    assert calls.pop('kxk') == [False]
    assert calls and all(runs == [False, True] for runs in calls.values())


def kept(forward):
    """Bytes that autograd keeps."""
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(found.values())


@pytest.mark.parametrize('kind', [DilatedReparamConv, LargeKernelConv])
def test_training_keeps_what_a_plain_convolution_and_its_norm_keep(kind):
    block = kind(8, 8, 13, padding=6, groups=8)
    plain = nn.Sequential(
        nn.Conv2d(8, 8, 13, padding=6, groups=8, bias=False),
        nn.BatchNorm2d(8),
    )
    x = image(4, 8, 56, 57, dtype=torch.float32).requires_grad_()
    assert kept(lambda: block(x)) < 1.1 * kept(lambda: plain(x))
    assert kept(lambda: block.forward_branches(x)) > 1.4 * kept(
        lambda: plain(x)
    )


def test_compiled():
    torch._dynamo.reset()
    block = build(LargeKernelConv, DEPTHWISE).train()
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    x, y = (image(2, 4, 14, 15).requires_grad_() for _ in range(2))
    with every_batch_is_large():
        a, b = compiled(x), twin.forward_branches(y)
    (a * image(*a.shape, seed=1)).sum().backward()
    (b * image(*b.shape, seed=1)).sum().backward()
    assert_same(state(block, a, x.grad), state(twin, b, y.grad))


@pytest.mark.parametrize('kind', [DilatedReparamConv, LargeKernelConv])
@pytest.mark.parametrize('training', [True, False])
def test_autocast(kind, training):
    """In bfloat16 as far from float64 as the literal sum is."""
    exact = build(kind, DEPTHWISE).train(training)
    x = image(3, 4, 21, 22)
    expected = copy.deepcopy(exact).forward_branches(x)
    single = copy.deepcopy(exact).float()
    errors = []
    for name in ('forward', 'forward_branches'):
        block = copy.deepcopy(single)
        with every_batch_is_large(), torch.autocast('cpu', torch.bfloat16):
            errors.append(distance(getattr(block, name)(x.float()), expected))
    assert errors[0] < 1.5 * errors[1] < 0.05


# Presets


def names(block):
    return list(block.branches)


@pytest.mark.parametrize(
    'size, expected',
    [
        (5, ['kxk', 'kxk_k3', 'kxk_k3_d2']),
        (7, ['kxk', 'kxk_k5', 'kxk_k3_d2', 'kxk_k3_d3']),
        (9, ['kxk', 'kxk_k5', 'kxk_k5_d2', 'kxk_k3_d3', 'kxk_k3_d4']),
        ((31, 9), ['kxk', 'kxk_k5', 'kxk_k5_d2', 'kxk_k3_d3', 'kxk_k3_d4']),
        # Larger than the paper's table: those of its last row.
        (
            31,
            [
                'kxk',
                'kxk_k5',
                'kxk_k9_d2',
                'kxk_k3_d4',
                'kxk_k3_d5',
                'kxk_k3_d7',
            ],
        ),
        (3, ['kxk']),
        ((3, 9), ['kxk']),
        (6, ['kxk']),
    ],
)
def test_dilated(size, expected):
    block = DilatedReparamConv(2, 2, size)
    assert names(block) == expected
    even = size == 6
    assert len(block.left_out) == (2 if even else 0)
    if even:
        assert block.left_out[1] == 'kxk (kernel_size=3, dilation=2)'


def test_large_kernel():
    assert names(LargeKernelConv(2, 2, 9)) == ['kxk', 'kxk_k5']
    assert names(LargeKernelConv(2, 2, 9, small_kernel=3)) == ['kxk', 'kxk_k3']
    assert names(LargeKernelConv(2, 2, 9, small_kernel=None)) == ['kxk']
    block = LargeKernelConv(2, 2, (9, 7), small_kernel=(5, 3))
    assert names(block) == ['kxk', 'kxk_k5x3']
    block = LargeKernelConv(2, 2, 8)
    assert names(block) == ['kxk']
    assert block.left_out == ['kxk (kernel_size=5)']
    with pytest.raises(ValueError, match='small_kernel or branches, not both'):
        LargeKernelConv(2, 2, 9, small_kernel=3, branches=['kxk'])
    with pytest.raises(TypeError, match="kernel_size must be .* got '5'"):
        LargeKernelConv(2, 2, 9, small_kernel='5')


def test_mobileone():
    assert names(MobileOneConv(4, 4, 3)) == [
        'identity',
        '1x1',
        'kxk',
        'kxk_2',
        'kxk_3',
        'kxk_4',
    ]
    block = MobileOneConv(4, 6, 1, num_conv_branches=2)
    assert names(block) == ['kxk', 'kxk_2']
    assert block.left_out == ['identity', '1x1']
    assert names(MobileOneConv(4, 6, 3, 2)) == ['1x1', *names(block)] + [
        'kxk_3',
        'kxk_4',
    ]
    for count, error in ((0, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match='num_conv_branches must be'):
            MobileOneConv(4, 4, 3, num_conv_branches=count)
    with pytest.raises(ValueError, match='num_conv_branches or branches, not'):
        MobileOneConv(4, 4, 3, num_conv_branches=2, branches=['kxk'])


@pytest.mark.parametrize(
    'name, plain, sizes',
    [
        ('DilatedReparamConv', (1, 3, 4), (5, 7, 31, (3, 5))),
        ('LargeKernelConv', (1, 3, 5, 6), (7, 31, (1, 7))),
        ('MobileOneConv', (7, 9), (1, 3, 6)),
    ],
)
def test_which_sizes_are_blocks(name, plain, sizes):
    """Each block has limits of its own; a config may change them."""
    kind = registered_blocks()[name]
    for size in plain:
        layer = build_conv_layer(dict(type=name), 4, 4, size)
        assert type(layer) is nn.Conv2d
        rule = dict(type=name, min_kernel_size=1, max_kernel_size=31)
        assert type(build_conv_layer(rule, 4, 4, size)) is kind
    for size in sizes:
        assert type(build_conv_layer(dict(type=name), 4, 4, size)) is kind


# In networks


@pytest.mark.parametrize('name', ['DilatedReparamConv', 'LargeKernelConv'])
def test_inserted_where_kernels_are_large(name):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            ConvModule(3, 8, 3, norm_cfg=dict(type='BN')),
            ConvModule(8, 8, 9, padding=4, groups=8, norm_cfg=dict(type='BN')),
            nn.Conv2d(8, 8, 1),
        )

    plain = randomize(network().double()).eval()
    model = copy.deepcopy(plain)
    insert_blocks_(model, dict(type=name))
    kinds = [
        type(m).__name__ for m in (model[0].conv, model[1].conv, model[2])
    ]
    assert kinds == ['Conv2d', name, 'Conv2d']
    x = image(2, 3, 13, 14)
    assert distance(model.eval()(x), plain(x)) < EXACT
    model.train()(x).sum().backward()
    merged = reparameterize(model.eval())
    assert distance(merged(x), model(x)) < EXACT
    fresh = network().double()
    insert_blocks_(fresh, dict(type=name))
    load_plain_weights_(fresh, plain.state_dict())
    assert distance(fresh.eval()(x), plain(x)) < EXACT
