"""Blocks with shift=False: norms that scale, and no bias after merging."""

import copy

import pytest
import torch
from helpers import (
    EXACT,
    assert_same,
    distance,
    every_batch_is_large,
    image,
    plain_conv,
    randomize,
    state,
)
from mmengine.model import convert_sync_batchnorm
from registered import blocks, each_block, starts_plain, sums_branches
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmdbb import ACB, DBB, insert_blocks_, merge_into_, reparameterize
from mmdbb.blocks.fast import fast_forward
from mmdbb.plain.blocks import copy_entries_, plain_start
from mmdbb.plain.branch_sums import NormValues
from mmdbb.scale_norm import ScaleNorm2d
from mmdbb.stock_weights import stock_state
from mmdbb.transforms import KernelBias

SUMS = each_block(sums_branches)
CASES = [
    dict(in_channels=6, out_channels=8, kernel_size=3, padding=1),
    dict(in_channels=6, out_channels=8, kernel_size=5, padding=1, stride=2),
    dict(in_channels=6, out_channels=6, kernel_size=3, padding=1, groups=6),
    dict(in_channels=8, out_channels=4, kernel_size=3, padding=2, groups=2)
    | dict(padding_mode='reflect', dilation=2),
]
PLAIN = dict(in_channels=4, out_channels=6, kernel_size=3, padding=1)


def built(kind=DBB, seed=0, **changes):
    kwargs = dict(PLAIN, bias=False, shift=False, **changes)
    return randomize(kind(**kwargs).double(), seed)


def literal(block, x):
    return block.forward_branches(x)


def step(block, x, forward):
    """Output, gradients and buffers after one step."""
    x = x.clone().requires_grad_()
    y = forward(block, x)
    y.backward(image(*y.shape, seed=5))
    return state(block, y.detach(), x.grad)


def norms_of(block):
    return [m for m in block.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize('momentum', [0.3, None])
def test_norm_divides_by_the_root_mean_square(momentum):
    """By hand, with a mean far from zero, which a batch norm takes away."""
    norm = ScaleNorm2d(2, eps=0.5, momentum=momentum).double()
    norm.weight.data.copy_(torch.tensor([3.0, -2.0]))
    x = torch.tensor([[7.0, 1.0], [3.0, -5.0]]).double()[:, :, None, None]
    squares = torch.tensor([(49 + 9) / 2, (1 + 25) / 2]).double()
    scale = norm.weight.detach() / (squares + 0.5).sqrt()
    assert distance(norm(x)[:, :, 0, 0], x[:, :, 0, 0] * scale) < EXACT
    expected = squares if momentum is None else 0.7 + 0.3 * squares
    assert distance(norm.running_var, expected) < EXACT
    assert norm.num_batches_tracked == 1 and not norm.running_mean.any()
    before = copy.deepcopy(norm.state_dict())
    scale = norm.weight.detach() / (expected + 0.5).sqrt()
    y = norm.eval()(x)
    assert distance(y[:, :, 0, 0], x[:, :, 0, 0] * scale) < EXACT
    assert all(torch.equal(v, before[n]) for n, v in norm.state_dict().items())


def test_norm_has_the_gradient_of_its_definition():
    norm, x = ScaleNorm2d(3).double(), image(2, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(norm, x)
    norm(torch.zeros_like(x)).sum().backward()
    assert all(p.grad.isfinite().all() for p in norm.parameters())


@pytest.mark.parametrize('kwargs', CASES, ids=str)
@pytest.mark.parametrize('kind', [DBB, ACB])
@pytest.mark.parametrize('training', [True, False])
def test_fast_equals_literal(kind, kwargs, training):
    block = randomize(kind(**kwargs, bias=False, shift=False)).double()
    twin = copy.deepcopy(block.train(training)).train(training)
    x = image(3, kwargs['in_channels'], 9, 11)
    with every_batch_is_large():
        found = step(block, x, fast_forward)
    assert_same(found, step(twin, x, literal))


def test_the_fast_way_is_taken():
    """Or the test above compares the literal sum with itself."""
    block, calls = built(), []
    block.forward_branches = lambda x: calls.append(x)
    with every_batch_is_large():
        block(image(3, 4, 9, 11))
    assert not calls


@SUMS
@pytest.mark.parametrize('kwargs', CASES, ids=str)
def test_merged_is_a_convolution_without_bias(kind, kwargs):
    block = randomize(kind(**kwargs, bias=False, shift=False)).double()
    x = image(3, kwargs['in_channels'], 9, 11)
    block(x)  # a training step moves the mean squares
    block.eval()
    conv = reparameterize(block)
    assert conv.bias is None
    with torch.no_grad():
        assert distance(conv(x), block.forward_branches(x)) < EXACT
        # What was built merged has the same entries.
        deployed = kind(**kwargs, bias=False, shift=False, deploy=True)
        deployed.reparam_conv.double().load_state_dict(conv.state_dict())
        assert distance(deployed(x), conv(x)) < EXACT


@SUMS
def test_every_norm_inside_only_scales(kind):
    block = kind(4, 4, 3, padding=1, bias=False, shift=False)
    assert norms_of(block)
    assert {type(norm) for norm in norms_of(block)} == {ScaleNorm2d}
    assert not [name for name, _ in block.named_parameters() if 'bias' in name]
    assert {type(n) for n in norms_of(kind(4, 4, 3))} == {nn.BatchNorm2d}


def test_a_bias_of_its_own_stays():
    block = randomize(DBB(**PLAIN, bias=True, shift=False).double()).eval()
    block.own_bias.data.copy_(image(6))
    x, conv = image(2, 4, 7, 6), reparameterize(block)
    assert torch.equal(conv.bias, block.own_bias)
    with torch.no_grad():
        assert distance(conv(x), block.forward_branches(x)) < EXACT


def test_its_weight_is_read_in_eval_mode_only():
    block = built()
    with pytest.raises(AttributeError, match='in training mode has no wei'):
        _ = block.weight
    conv = reparameterize(block.eval())
    assert block.bias is None
    assert distance(block.weight, conv.weight) < EXACT


def test_merges_where_no_bias_has_a_place():
    """Before a group norm, which the stock network has."""
    stock = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.GroupNorm(2, 6)
    ).double()
    model = nn.Sequential(built(), copy.deepcopy(stock[1])).eval()
    x = image(2, 4, 7, 6)
    stock.load_state_dict(stock_state(model, stock))
    with torch.no_grad():
        expected = model[1](model[0].forward_branches(x))
        assert distance(stock(x), expected) < EXACT


def test_goes_into_any_model_and_back():
    plain = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.GroupNorm(2, 6)
    ).double()
    model, x = copy.deepcopy(plain), image(2, 4, 7, 6)
    insert_blocks_(model, dict(type='DBB', shift=False))
    with torch.no_grad():
        assert distance(model.eval()(x), plain(x)) < EXACT
        expected = randomize(model)(x)
        merge_into_(plain, model)
        assert distance(plain(x), expected) < EXACT
    assert plain[0].bias is None


def test_settings_of_the_norm_stay():
    cfg = dict(type='SyncBN', eps=0.1, momentum=0.2, requires_grad=False)
    norm = DBB(**PLAIN, shift=False, norm_cfg=cfg).branches['kxk'].norm
    assert (norm.eps, norm.momentum) == (0.1, 0.2)
    assert norm.synchronized and not norm.weight.requires_grad
    bare = DBB(**PLAIN, shift=False, norm_cfg=dict(type='BN', affine=False))
    assert bare.branches['kxk'].norm.weight is None
    with pytest.raises(ValueError, match='cannot be merged'):
        DBB(**PLAIN, shift=False, norm_cfg=dict(type='GN', num_groups=2))
    with pytest.raises(TypeError, match='shift must be True or False'):
        DBB(**PLAIN, shift=None)


CONVERTERS = dict(
    torch=nn.SyncBatchNorm.convert_sync_batchnorm,
    mmengine=convert_sync_batchnorm,
)


@pytest.mark.parametrize('convert', CONVERTERS.values(), ids=CONVERTERS)
@pytest.mark.parametrize('changes', [{}, dict(sum_norm=True)], ids=str)
def test_a_trainers_sync_bn_does_not_bring_the_shift_back(convert, changes):
    model = nn.Sequential(built(**changes), nn.BatchNorm2d(6).double())
    before = norms_of(model[0])
    converted = convert(model)
    assert norms_of(converted[0]) == before
    assert all(norm.synchronized for norm in before)
    assert type(converted[1]) is nn.SyncBatchNorm
    assert reparameterize(converted[0]).bias is None


def test_weights_with_a_shift_do_not_load_by_mistake():
    with pytest.raises(RuntimeError, match='norm.running_mean'):
        built().load_state_dict(DBB(**PLAIN, bias=False).state_dict())


@pytest.mark.parametrize('kind', blocks(starts_plain, sums_branches))
@pytest.mark.parametrize('behind', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_starts_as_a_plain_convolution(kind, behind, bias):
    conv, x = nn.Conv2d(**PLAIN, bias=bias).double(), image(8, 4, 9, 8)
    norm = nn.BatchNorm2d(6, momentum=None).double()
    norm(conv(x))
    values = NormValues.of(norm) if behind else None
    zero = torch.zeros(6).double()
    plain = KernelBias(conv.weight, zero if conv.bias is None else conv.bias)
    block = kind(**PLAIN, bias=bias, shift=False).double()
    copy_entries_(block, plain_start(block, plain, values))
    with torch.no_grad():
        started = block.eval().forward_branches(x)
        assert distance(started, conv(x)) < EXACT
        if behind:  # the dense branch knows the size of its output
            dense = block.branches[block.dense_branch]
            y = plain_conv(block.spec, plain.kernel, zero)(x)
            found = dense.norm.running_var
            assert distance(found, y.square().mean((0, 2, 3))) < 1e-2


def test_has_no_place_for_a_norm_or_a_bias_to_start_from():
    block, norm = built(), randomize(nn.BatchNorm2d(6).double())
    weight = image(6, 4, 3, 3)
    with pytest.raises(ValueError, match='no place for the mean and bias'):
        plain = KernelBias(weight, torch.zeros(6))
        plain_start(block, plain, NormValues.of(norm), absorbed=True)
    with pytest.raises(ValueError, match='bias, the block with shift=False'):
        plain_start(block, KernelBias(weight, torch.ones(6)))


def test_a_checkpointed_segment_counts_its_batch_once():
    block, x = built(), image(3, 4, 9, 11)
    expected = step(copy.deepcopy(block), x, literal)

    def forward(block, x):
        return checkpoint(block, x, use_reentrant=False)

    assert_same(step(block, x, forward), expected)


@pytest.mark.parametrize('way', [fast_forward, literal])
def test_in_half_precision(way):
    block, x = built().float(), image(3, 4, 9, 11, dtype=torch.float32)
    expected = copy.deepcopy(block).double().forward_branches(x.double())
    with every_batch_is_large(), torch.autocast('cpu', torch.bfloat16):
        y = way(block, x)
    assert y.dtype is torch.bfloat16
    assert distance(y, expected) < 0.05
    assert all(
        norm.running_var.dtype is torch.float32 for norm in norms_of(block)
    )


def test_compiles():
    block, x = built().float(), image(3, 4, 9, 11, dtype=torch.float32)
    expected = copy.deepcopy(block)(x)
    compiled = torch.compile(block, backend='eager', fullgraph=True)
    assert distance(compiled(x), expected) < 1e-5
