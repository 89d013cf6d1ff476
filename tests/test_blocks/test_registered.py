"""Every registered block in a model of a user's own: there and back."""

import copy

import pytest
import torch
from helpers import EXACT, blocks_of, distance, image, randomize
from registered import each_block, is_block_of, name_of, starts_otherwise
from registered import starts_plain as can_start_plain
from torch import nn

from mmdbb import (
    insert_blocks_,
    load_plain_weights_,
    merge_into_,
    reparameterize,
)
from mmdbb.blocks import ReparamConv2d
from mmdbb.blocks.build import layer_of
from mmdbb.errors import UserError
from mmdbb.reparam import literal_forward
from mmdbb.stock_weights import stock_state

SHAPE = (2, 3, 9, 10)


def network(layer=nn.Conv2d):
    """Three convolutions: with a norm behind, a norm and a stride, neither."""
    return nn.Sequential(
        layer(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        layer(4, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        layer(4, 8, 3, stride=2, padding=1, groups=2),
    )


def built(layer=nn.Conv2d, seed=0):
    return randomize(network(layer).double(), seed).eval()


def literal(model, x):
    with literal_forward(model), torch.no_grad():
        return model(x)


def sizes_of(kind):
    """Where the network's convolutions are blocks of this kind."""
    sizes = {'0': 3, '3': 1, '5': 3}
    return [name for name, k in sizes.items() if is_block_of(kind, k)]


@each_block()
@pytest.mark.parametrize('inplace', [True, False])
def test_merged_nothing_of_ours_is_left(kind, inplace):
    model, x = built(layer_of(kind)), image(*SHAPE)
    assert len(blocks_of(model)) == len(sizes_of(kind))
    names = [name for name, _ in model.named_children()]
    expected = literal(model, x)
    merged = reparameterize(model, inplace=inplace)
    assert (merged is model) is inplace
    with torch.no_grad():
        assert distance(merged(x), expected) < EXACT
    for module in merged.modules():
        assert not type(module).__module__.startswith('mmdbb')
    for name in sizes_of(kind):
        assert type(merged.get_submodule(name)) is nn.Conv2d
    assert [name for name, _ in merged.named_children()] == names
    # The plain network takes the weights, if its layers have biases.
    plain = network()
    for name, conv in merged.named_children():
        if isinstance(conv, nn.Conv2d) and conv.bias is not None:
            plain[int(name)].bias = nn.Parameter(torch.zeros_like(conv.bias))
    plain.load_state_dict(merged.state_dict())


@each_block()
def test_the_stock_network_takes_what_was_merged(kind):
    model, x = built(layer_of(kind)), image(*SHAPE)
    stock = network().double().eval()
    stock.load_state_dict(stock_state(model, stock))
    with torch.no_grad():
        assert distance(stock(x), literal(model, x)) < EXACT


@each_block(can_start_plain)
def test_inserted_and_merged_into_the_model_again(kind):
    plain, x = built(), image(*SHAPE)
    model = copy.deepcopy(plain)
    names = insert_blocks_(model, dict(type=name_of(kind)))
    assert names == sizes_of(kind)
    assert all(type(model.get_submodule(name)) is kind for name in names)
    with torch.no_grad():
        assert distance(literal(model, x), plain(x)) < EXACT
        randomize(model, 1)
        expected = literal(model, x)
        assert distance(plain(x), expected) > 1e-3
        entries = {n: v.shape for n, v in plain.state_dict().items()}
        merge_into_(plain, model)
        assert distance(plain(x), expected) < EXACT
    assert entries == {n: v.shape for n, v in plain.state_dict().items()}


@each_block(can_start_plain)
def test_starts_from_plain_weights(kind):
    model, plain, x = built(layer_of(kind)), built(seed=1), image(*SHAPE)
    loaded = load_plain_weights_(model, plain.state_dict())
    assert loaded.blocks == sizes_of(kind)
    assert not (loaded.missing or loaded.unexpected or loaded.mismatched)
    with torch.no_grad():
        assert distance(literal(model, x), plain(x)) < EXACT


@each_block(starts_otherwise)
def test_what_cannot_start_plain_says_so(kind):
    plain = built()
    model = copy.deepcopy(plain)
    with pytest.raises(ValueError, match='cannot start as a plain conv'):
        insert_blocks_(model, dict(type=name_of(kind)))
    assert not blocks_of(model)
    model = built(layer_of(kind))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match='cannot start as a plain conv'):
        load_plain_weights_(model, plain.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@each_block()
def test_is_documented_and_a_block(kind):
    assert issubclass(kind, ReparamConv2d) and kind.__doc__
    smallest, largest = kind.kernel_sizes
    assert 1 <= smallest <= largest
