"""Blocks whose pads follow from the image, as mmcv's adaptive convolution."""

import copy
import itertools

import pytest
import torch
from helpers import (
    EXACT,
    distance,
    every_batch_is_large,
    image,
    randomize,
)
from mmcv.cnn import build_conv_layer
from registered import each_block
from torch import nn

from mmdbb.blocks import DBB
from mmdbb.geometry import ConvSpec, adaptive_pads
from mmdbb.plain_conv import AdaptiveConv2d
from mmdbb.reparam import reparameterize

KINDS = each_block()
SIZES = [(8, 9), (9, 8), (11, 6)]


def build(kind, *, seed=0, **arguments):
    """A block in float64, whose other padding must not count."""
    arguments = dict(dict(kernel_size=3, stride=2, padding=5), **arguments)
    block = kind(4, 6, adaptive_padding=True, **arguments)
    return randomize(block.double(), seed)


def mmcvs(conv):
    """mmcv's own layer with the weights of a merged block."""
    layer = build_conv_layer(
        dict(type='Conv2dAdaptivePadding'),
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        7,
        conv.dilation,
        conv.groups,
        bias=conv.bias is not None,
    ).double()
    layer.load_state_dict(conv.state_dict())
    return layer


def test_the_rule_is_mmcvs():
    x = image(1, 2, 13, 10)
    cases = itertools.product((1, 2, 3, 4, 5), (1, 2, 3), (1, 2), range(5, 14))
    for kernel, stride, dilation, size in cases:
        conv = AdaptiveConv2d(2, 3, kernel, stride, dilation=dilation).double()
        part = x[..., :size, :]
        assert torch.equal(conv(part), mmcvs(conv)(part))
    assert adaptive_pads((8, 9), (3, 3), (2, 2), (1, 1)) == (0, 1, 1, 1)
    with pytest.raises(ValueError, match="padding='adaptive' pads with zeros"):
        ConvSpec(4, 4, 3, padding='adaptive', padding_mode='reflect')


@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(groups=2, kernel_size=(2, 4)),
        dict(dilation=2, kernel_size=(5, 3), stride=(3, 2)),
        dict(dilation=2, kernel_size=4),  # whose middle is a tie
        dict(stride=1, kernel_size=4),
    ],
    ids=str,
)
@KINDS
def test_merged_is_mmcvs_layer(kind, arguments):
    block = build(kind, **arguments).eval()
    conv = reparameterize(block)
    built = kind(
        4,
        6,
        **{'kernel_size': 3, 'stride': 2, **arguments},
        adaptive_padding=True,
        deploy=True,
    ).double()
    merged = copy.deepcopy(block)
    merged.switch_to_deploy()
    built.load_state_dict(merged.state_dict())
    stock = mmcvs(conv)
    for size in SIZES:
        x = image(2, 4, *size)
        with torch.no_grad():
            expected = block.forward_branches(x)
            assert distance(block(x), expected) < EXACT
        assert distance(block(x), expected) < EXACT  # with a gradient
        for other in (conv, stock, merged, built):
            assert distance(other(x), expected) < EXACT
    if block.stride == (1, 1):
        assert type(conv) is nn.Conv2d  # torch has this one


@KINDS
def test_even_images_see_every_second_pixel(kind):
    """There the window of a stride begins on the image, and ends beside it."""
    block = build(kind).eval()
    x = image(2, 4, 8, 6)
    y = block.forward_branches(x)
    every = copy.deepcopy(block)
    every.stride = 1
    assert distance(y, every.forward_branches(x)[..., 1::2, 1::2]) < EXACT


@KINDS
def test_odd_images_train_as_with_fixed_pads(kind):
    block = build(kind).train()
    fixed = kind(4, 6, 3, 2, 1).double().train()
    fixed.load_state_dict(block.state_dict())
    x = image(3, 4, 9, 11)
    with every_batch_is_large():
        y, expected = block(x), fixed(x)
        assert distance(y, expected) < EXACT
        grad = image(*y.shape, seed=1)
        y.backward(grad)
        expected.backward(grad)
    for parameter, other in zip(block.parameters(), fixed.parameters()):
        assert distance(parameter.grad, other.grad) < EXACT
    for buffer, other in zip(block.buffers(), fixed.buffers()):
        assert distance(buffer.double(), other.double()) < EXACT


@pytest.mark.parametrize('groups', [1, 4])
@KINDS
def test_a_step_over_two_sizes_is_the_literal_one(kind, groups):
    """The backward pass computes again what it needs, at each one's size."""
    block = (
        build(kind, groups=groups, seed=groups)
        if groups == 1
        else (
            randomize(
                kind(4, 4, 3, 2, groups=4, adaptive_padding=True).double()
            )
        )
    )
    literal = copy.deepcopy(block)
    found = []
    for net, run in ((block, block), (literal, literal.forward_branches)):
        inputs = [image(3, 4, *size).requires_grad_() for size in SIZES]
        with every_batch_is_large():
            outputs = [run(x) for x in inputs]
            sum(y.square().sum() for y in outputs).backward()
        found.append(
            [
                *(y.detach() for y in outputs),
                *(x.grad for x in inputs),
                *(p.grad for p in net.parameters()),
                *(b.double() for b in net.buffers()),
            ]
        )
    for one, other in zip(*found):
        assert distance(one, other) < 1e-10


def test_a_geometry_set_later_stays_adaptive():
    block = build(DBB, stride=1).eval()
    stock = mmcvs(reparameterize(block))
    block.stride, block.dilation = 2, (2, 1)
    stock.stride, stock.dilation = (2, 2), (2, 1)
    x = image(2, 4, 8, 9)
    assert distance(block(x), stock(x)) < EXACT
    block.switch_to_deploy()
    block.stride, stock.stride = (1, 2), (1, 2)
    assert distance(block(x), stock(x)) < EXACT
    with pytest.raises(ValueError, match='follows from the image, got 1'):
        block.padding = 1


def test_a_merged_block_takes_a_stride_later():
    block = DBB(4, 6, 3, adaptive_padding=True, deploy=True).double()
    stock = mmcvs(block.reparam_conv)
    block.stride, stock.stride = 2, (2, 2)
    x = image(2, 4, 8, 9)
    assert distance(block(x), stock(x)) < EXACT


def test_plain_layers_of_the_config_are_adaptive_too():
    cfg = dict(type='DBB', adaptive_padding=True)
    stem = build_conv_layer(cfg, 3, 4, 7, stride=2, padding=3)
    point = build_conv_layer(cfg, 3, 4, 1, stride=2, padding=3)
    assert type(stem) is AdaptiveConv2d and type(point) is nn.Conv2d
    x = image(1, 3, 8, 9, dtype=torch.float32)
    assert point(x).shape == stem(x).shape == (1, 4, 4, 5)


@pytest.mark.parametrize('mode', [True, False])
def test_traced_by_torch(mode):
    block, x = build(DBB).train(mode), image(2, 4, 8, 9)
    expected = copy.deepcopy(block)(x)
    traced = torch.jit.trace(copy.deepcopy(block), x, check_trace=False)
    # Tracing has run the block once; it needs no batch of its own in eval.
    assert mode or distance(traced(x), expected) < EXACT
    compiled = torch.compile(
        copy.deepcopy(block), backend='eager', fullgraph=True
    )
    assert distance(compiled(x), expected) < EXACT
    if not mode:
        exported = torch.export.export(block, (x,)).module()
        assert distance(exported(x), expected) < EXACT
