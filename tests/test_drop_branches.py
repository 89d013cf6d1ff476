"""Branches that are dropped: what is left computes the same."""

import copy

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from registered import each_block, starts_plain, sums_several
from torch import nn

from mmdbb import ACB, DBB, OREPAConv, QARepVGGConv, RepVGGConv
from mmdbb.blocks.build import registered_blocks
from mmdbb.drop_branches import drop_branches_, weak_branches
from mmdbb.errors import UserError
from mmdbb.shares import branch_shares

X = image(2, 4, 7, 6)


def built(kind=DBB, **kwargs):
    block = randomize(kind(4, 4, (3, 2), padding=1, **kwargs)).double()
    return nn.Sequential(block, nn.ReLU()).eval()


def others(block):
    return [key for key in block.branches if key != block.dense_branch]


def assert_dropped(net, keys, x=X):
    """In eval mode nothing changes, by the branches one by one too."""
    expected = net[0].forward_branches(x)
    net(x)  # which may keep a kernel
    left = [key for key in net[0].branches if key not in keys]
    drop_branches_(net, {'0': keys})
    assert list(net[0].branches) == left
    assert distance(net[0].forward_branches(x), expected) < EXACT
    assert distance(net(x), expected.relu()) < EXACT


@each_block(sums_several, starts_plain)
@pytest.mark.parametrize('shift', [True, False])
def test_eval_mode_stays(kind, shift):
    net = built(kind, shift=shift)
    keys = others(net[0])
    if 'kxk' not in net[0].branches:  # OREPA's composed kernel
        with pytest.raises(UserError, match='any kernel can be folded into'):
            drop_branches_(net, {'0': keys})
        return
    if shift:  # as weights on a GPU would be
        net.to(memory_format=torch.channels_last)
    assert_dropped(net, keys[:1])
    assert_dropped(net, keys[1:])


@pytest.mark.parametrize(
    ('kind', 'kwargs'),
    [
        (DBB, dict(groups=2)),
        (DBB, dict(groups=4)),
        (DBB, dict(norm_cfg=dict(type='BN', affine=False))),
        (DBB, dict(norm_cfg=dict(type='BN', affine=False), shift=False)),
        (QARepVGGConv, {}),
        (DBB, dict(branches=['1x1', 'kxk', 'kxk'], sum_norm=True)),
        (DBB, dict(branches=[dict(type='kxk', norm=False), 'identity_'])),
    ],
)
def test_eval_mode_stays_in_other_forms(kind, kwargs):
    if 'identity_' in kwargs.get('branches', ()):
        none = dict(norm=False)
        kwargs['branches'] = [
            dict(type=name, **none) for name in ('kxk', '1x1', 'identity')
        ]
    net = built(kind, **kwargs)
    keys = [key for key in net[0].branches if key != 'kxk']
    assert_dropped(net, keys)


@pytest.mark.parametrize('shift', [True, False])
@pytest.mark.parametrize(
    'name',
    ['DBB1d', 'DBB3d', 'ACB3d', 'DBBTranspose1d', 'DBBTranspose2d'],
)
def test_eval_mode_stays_in_other_dimensions(name, shift):
    kind = registered_blocks(None)[name]
    size = dict(kernel_size=3, stride=2, padding=1, groups=2, shift=shift)
    net = nn.Sequential(randomize(kind(4, 6, **size)).double(), nn.ReLU())
    net.eval()
    keys = [key for key in net[0].branches if key != 'kxk']
    assert weak_branches(net, 1e9) == {'0': keys}
    assert_dropped(net, keys, image(2, 4, *(7, 6, 5)[: kind.dims]))


def test_channels_without_a_scale():
    """A gamma of zero would divide what is folded by zero."""
    net = built()
    gamma = net[0].branches['kxk'].norm.weight.data
    gamma[0], gamma[1] = 0.0, 1e-12
    assert_dropped(net, others(net[0]))
    weight = net[0].branches['kxk'].conv.weight
    assert weight.abs().max() < 100


def test_a_small_share_may_come_with_a_large_bias():
    """The share measures kernels: what is cut may matter, folded it may not.

    So documentation must not say that a small share has a small effect.
    """
    net = built()
    norm = net[0].branches['1x1'].norm
    norm.weight.data.mul_(1e-3)
    norm.bias.data.fill_(5.0)
    expected = net[0].forward_branches(X)
    weak = weak_branches(net, 0.01)
    assert weak == {'0': ['1x1']}
    assert branch_shares(net[0]).branches['1x1'].share < 0.01
    cut = copy.deepcopy(net)
    drop_branches_(cut, weak, fold=False)
    assert distance(cut[0].forward_branches(X), expected) > 0.5
    drop_branches_(net, weak)
    assert distance(net[0].forward_branches(X), expected) < EXACT


def test_the_mean_in_training_is_kept():
    """Statistics as data give them: the output's mean stays in training."""
    torch.manual_seed(0)
    net = built()
    x = torch.randn(64, 4, 12, 11).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()
    for _ in range(3):
        before = net[0].forward_branches(x)
    other = copy.deepcopy(net)
    keys = others(net[0])[:2]
    drop_branches_(net, {'0': keys})
    drop_branches_(other, {'0': keys}, fold=False)
    means = [y[0].forward_branches(x).mean((0, 2, 3)) for y in (net, other)]
    wanted = before.mean((0, 2, 3))
    assert distance(means[0], wanted) < 0.02  # the border differs a little
    assert distance(means[1], wanted) > 0.2
    spread = net[0].forward_branches(x).std((0, 2, 3))
    assert distance(spread, before.std((0, 2, 3))) < 0.1


def test_training_goes_on():
    net = built().train()
    drop_branches_(net, {'0': ['1x1', '1x1_avg']})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = net(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    twin = built(branches=['kxk', '1x1_kxk'])
    twin.load_state_dict(net.state_dict())


def test_weak_ones_are_those_with_small_shares():
    net = built()
    for key, gamma in dict(zip(others(net[0]), (1e-3, 0.5, 1e-2))).items():
        net[0].branches[key].last_norm.weight.data.fill_(gamma)
    shares = branch_shares(net[0]).branches
    found = weak_branches(net, 0.05)
    assert found['0'] == [k for k in others(net[0]) if shares[k].share <= 0.05]
    assert 1 <= len(found['0']) < 3
    net[0].branches['kxk'].last_norm.weight.data.fill_(1e-9)
    assert 'kxk' not in weak_branches(net, 0.5)['0']
    assert weak_branches(net, 0.0) == {}
    # Nothing to fold into, or no sum at all.
    rest = nn.Sequential(
        built(branches=['1x1', '1x1_avg'])[0], OREPAConv(2, 2, 3)
    )
    assert weak_branches(rest, 100.0) == {}
    for wrong in (-0.1, float('nan')):
        with pytest.raises(ValueError, match='threshold must be at least 0'):
            weak_branches(net, wrong)


@pytest.mark.parametrize(
    ('dropped', 'message'),
    [
        ({'5': ['1x1']}, "no block '5' to drop branches of; .* has '?0"),
        ({'0': ['9x9']}, r"0: it has no branches \['9x9'\]; they are \['kxk'"),
        ({'0': ['kxk', '1x1', '1x1_avg', '1x1_kxk']}, 'no branch would be'),
        ({'0': ['kxk']}, 'no branch is left that any kernel'),
        ({'0': '1x1'}, 'must be a list'),
        ({'0': ['1x1', '1x1']}, 'must be a list'),
        ({'2': ['1x1']}, '2 is a block that is listed already'),
    ],
)
def test_what_cannot_be_dropped(dropped, message):
    net = built()
    net.append(net[0])
    before = copy.deepcopy(net.state_dict())
    if '2' in dropped:
        dropped = {'0': ['1x1'], **dropped}
    with pytest.raises(UserError, match=message):
        drop_branches_(net, {'0': ['1x1_avg'], **dropped})
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert len(net[0].branches) == 4


def test_what_is_not_finite_is_not_folded():
    net = built()
    net[0].branches['1x1'].norm.running_var[2] = float('nan')
    with pytest.raises(UserError, match='0: what would be folded is not fin'):
        drop_branches_(net, {'0': ['1x1']})
    assert '1x1' in net[0].branches and '0' not in weak_branches(net)


def test_blocks_that_cannot_drop_any():
    with pytest.raises(UserError, match='composes its kernel'):
        drop_branches_(nn.Sequential(OREPAConv(2, 2, 3)), {'0': ['1x1']})
    merged = nn.Sequential(ACB(2, 2, 3))
    merged[0].switch_to_deploy()
    with pytest.raises(UserError, match='is merged'):
        drop_branches_(merged, {'0': ['kx1']})
    bare = dict(type='kxk', norm=False)
    net = nn.Sequential(
        RepVGGConv(4, 4, 3, bias=False, branches=[bare, '1x1'])
    )
    with pytest.raises(UserError, match='has no place'):
        drop_branches_(randomize(net), {'0': ['1x1']})
