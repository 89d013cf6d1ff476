"""Presets, chosen branches, gammas and biases."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT, distance, image, randomize
from registered import each_block, has_gammas
from torch import nn

from mmdbb.blocks import ACB, DBB, BranchSumConv2d, QARepVGGConv, RepVGGConv


def names(block):
    return list(block.branches)


def gammas(block):
    return [
        b.last_norm.weight.unique().tolist() for b in block.branches.values()
    ]


# Presets


@pytest.mark.parametrize(
    'block, expected, left_out',
    [
        (DBB(4, 8, 3), ['kxk', '1x1', '1x1_avg', '1x1_kxk'], []),
        # On a depthwise one there is no 1x1, as in the paper's code.
        (DBB(4, 4, 3, groups=4), ['kxk', '1x1_avg', '1x1_kxk'], []),
        (DBB(4, 8, 1), ['kxk', '1x1_kxk'], ['1x1', '1x1_avg']),
        (ACB(4, 8, 3), ['kxk', 'kx1', '1xk'], []),
        (ACB(4, 8, (1, 3)), ['kxk'], ['kx1', '1xk']),
        (RepVGGConv(4, 4, 3), ['identity', 'kxk', '1x1'], []),
        (RepVGGConv(4, 8, 3), ['kxk', '1x1'], ['identity']),
        (RepVGGConv(4, 4, 3, 2), ['kxk', '1x1'], ['identity']),
        (RepVGGConv(4, 8, 1), ['kxk'], ['identity', '1x1']),
        (QARepVGGConv(4, 4, 3), ['kxk', '1x1', 'identity'], []),
        (QARepVGGConv(4, 8, 3), ['kxk', '1x1'], ['identity']),
    ],
    ids=str,
)
def test_presets(block, expected, left_out):
    assert names(block) == expected
    assert block.left_out == left_out
    if left_out:
        assert f'left_out={left_out}' in repr(block)
    else:
        assert 'left_out' not in repr(block)


def test_repr_is_that_of_a_convolution():
    text = repr(DBB(4, 8, 3, stride=2, padding=1, groups=2))
    assert text.startswith(
        'DBB(\n  4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), '
        'groups=2'
    )


# branches=


def test_branches_override_the_preset():
    block = DBB(4, 8, 3, branches=['kxk', dict(type='1x1')])
    assert names(block) == ['kxk', '1x1']


def test_duplicates_are_numbered_and_independent():
    block = randomize(
        DBB(4, 8, 3, padding=1, branches=['kxk', '1x1', 'kxk', 'kxk'])
    )
    assert names(block) == ['kxk', '1x1', 'kxk_2', 'kxk_3']
    first, second = block.branches['kxk'], block.branches['kxk_2']
    assert not torch.equal(first.conv.weight, second.conv.weight)


def test_options_of_one_branch():
    cfg = dict(type='1x1_kxk', internal_channels=10)
    block = DBB(4, 8, 3, branches=['kxk', cfg])
    assert block.branches['1x1_kxk'].conv2.in_channels == 10
    assert cfg == dict(type='1x1_kxk', internal_channels=10)


@pytest.mark.parametrize(
    'error, branches, message',
    [
        (ValueError, ['3x3'], "unknown branch '3x3'; allowed: .*'1x1_kxk'"),
        (
            TypeError,
            [dict(type='kxk', wide=1)],
            r"'kxk' got unknown keys \['wide'\]; allowed: \['type', 'norm', "
            r"'kernel_size', 'dilation'\]",
        ),
        (
            TypeError,
            [dict(type='1x1_kxk', channels=1)],
            r"allowed: \['type', 'internal_channels'\]",
        ),
        (TypeError, 'kxk', "branches must be a list.*got 'kxk'"),
        (TypeError, [], r'branches must be a list of branches, got \[\]'),
        (TypeError, [3], 'a branch is a name or a dict.*got 3'),
        (
            ValueError,
            ['identity'],
            "'identity' needs stride 1 and as many channels out as in",
        ),
    ],
)
def test_bad_branches(error, branches, message):
    with pytest.raises(error, match=message):
        DBB(4, 8, 3, branches=branches)


def test_explicit_branch_that_cannot_serve_raises():
    with pytest.raises(ValueError, match="'1x1' needs a kernel larger"):
        DBB(4, 8, 1, branches=['kxk', '1x1'])


def test_no_branch_at_all():
    class Pools(BranchSumConv2d):
        preset = ('1x1_avg',)

    with pytest.raises(ValueError, match='Pools has no branch .*allowed'):
        Pools(4, 8, 1)
    with pytest.raises(ValueError, match='has no branch'):
        BranchSumConv2d(4, 8, 3)


def test_unknown_argument():
    with pytest.raises(TypeError, match='internal_channels'):
        DBB(4, 8, 3, internal_channels=3)


# Gammas


def test_gammas_start_with_one():
    assert gammas(DBB(4, 8, 3)) == [[1.0]] * 4


def test_gamma_init():
    assert gammas(DBB(4, 8, 3, gamma_init=0.25)) == [[0.25]] * 4
    assert gammas(DBB(4, 8, 3, gamma_init=0)) == [[0.0]] * 4


@each_block(has_gammas)
def test_single_init_starts_as_one_branch(kind):
    block = kind(4, 4, 3, padding=1, single_init=True).double().eval()
    first, *others = gammas(block)
    assert first == [1.0] and others == [[0.0]] * len(others)
    x = image(2, 4, 5, 6)
    alone = next(iter(block.branches.values()))
    assert distance(block(x), alone(x)) < EXACT


def test_reduce_gamma():
    found = torch.tensor(gammas(ACB(4, 8, 3, reduce_gamma=True)))
    assert torch.equal(found, torch.full((3, 1), 1 / 3))


def test_gamma_options_exclude_each_other():
    with pytest.raises(ValueError, match='gamma_init or single_init, not'):
        DBB(4, 8, 3, gamma_init=1.0, single_init=True)
    with pytest.raises(ValueError, match='reduce_gamma or gamma_init, not'):
        ACB(4, 8, 3, reduce_gamma=True, gamma_init=1.0)
    with pytest.raises(ValueError, match='reduce_gamma or single_init, not'):
        ACB(4, 8, 3, reduce_gamma=True, single_init=True)


def test_no_gamma_to_initialise():
    with pytest.raises(ValueError, match="'kxk' has no gamma.*affine=False"):
        DBB(4, 8, 3, norm_cfg=dict(type='BN', affine=False), gamma_init=1.0)


# A norm after the sum, branches without one


@pytest.mark.parametrize('training', [True, False])
def test_qarepvgg_is_the_papers(training):
    """QARepVGGBlockV2 of the paper's code, written out."""
    block = randomize(QARepVGGConv(4, 4, 3, padding=1).double())
    block.train(training)
    x = image(3, 4, 5, 6)
    kxk = block.branches['kxk']
    dense = copy.deepcopy(kxk.norm)(F.conv2d(x, kxk.conv.weight, None, 1, 1))
    small = F.conv2d(x, block.branches['1x1'].conv.weight)
    expected = copy.deepcopy(block.norm)(dense + small + x)
    assert distance(block(x), expected) < EXACT
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [kxk.norm, block.norm]


def test_sum_norm_in_a_config_of_branches():
    x = image(2, 4, 5, 6)
    plain = randomize(DBB(4, 8, 3, padding=1).double()).eval()
    block = DBB(4, 8, 3, padding=1, sum_norm=True).double()
    block.load_state_dict(plain.state_dict(), strict=False)
    randomize(nn.Sequential(block.norm), seed=1)
    block.eval()
    expected = block.norm(plain(x))
    assert distance(block(x), expected) < EXACT
    assert distance(block.to_conv()(x), expected) < EXACT
    without = QARepVGGConv(4, 8, 3, sum_norm=False)
    assert without.norm is None and without.own_bias is None


def test_gamma_of_the_norm_after_the_sum():
    block = QARepVGGConv(4, 8, 3, gamma_init=0.5)
    assert block.norm.weight.unique().tolist() == [0.5]
    assert block.branches['kxk'].norm.weight.unique().tolist() == [1.0]
    with pytest.raises(ValueError, match="branch '1x1' has no gamma.*left"):
        QARepVGGConv(4, 8, 3, single_init=True)


def test_nothing_to_train():
    with pytest.raises(ValueError, match='has no parameter; give it a norm'):
        DBB(4, 4, 3, branches=[dict(type='identity', norm=False)])


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_bare_identity_has_the_blocks_dtype(dtype):
    block = QARepVGGConv(4, 4, 3, norm_cfg=dict(type='BN')).to(dtype)
    assert block.get_equivalent_kernel_bias().kernel.dtype == dtype


# Biases


def test_no_bias_where_norms_shift():
    block = DBB(4, 8, 3, bias=True)
    assert block.own_bias is None
    assert 'bias' not in block.state_dict()


def test_own_bias_where_no_norm_shifts():
    block = DBB(4, 8, 3, norm_cfg=dict(type='BN', affine=False)).double()
    assert block.bias.abs().max() == 0
    randomize(block).eval()
    assert block.bias.abs().max() > 0
    x = image(2, 4, 5, 6)
    expected = block(x)
    without = sum(b(x) for b in block.branches.values())
    assert distance(expected, without + block.bias.reshape(-1, 1, 1)) < EXACT
    block.switch_to_deploy()
    assert distance(block(x), expected) < EXACT
    assert list(block.state_dict()) == [
        'reparam_conv.weight',
        'reparam_conv.bias',
    ]


def test_no_bias_when_none_is_wanted():
    block = DBB(4, 8, 3, bias=False, norm_cfg=dict(type='BN', affine=False))
    assert block.own_bias is None


def test_forward_branches_is_the_sum():
    block = randomize(DBB(4, 8, 3, padding=1).double()).eval()
    x = image(2, 4, 5, 6)
    expected = sum(branch(x) for branch in block.branches.values())
    assert distance(block.forward_branches(x), expected) < EXACT
    assert distance(block(x), expected) < EXACT


def test_norm_cfg_reaches_all_norms():
    block = DBB(4, 8, 3, norm_cfg=dict(type='BN', eps=0.5, momentum=0.2))
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6
    assert all(n.eps == 0.5 and n.momentum == 0.2 for n in norms)
