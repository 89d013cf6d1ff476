"""The one walk that merges the blocks of a model."""

import copy

import pytest
import torch
from helpers import EXACT, blocks_of, distance, image, randomize
from torch import nn

import mmdbb
from mmdbb import ACB, DBB, DiverseBranchBlock, reparameterize
from mmdbb.blocks import ReparamConv2d, RepVGGConv
from mmdbb.reparam import find_blocks, literal_forward


class Net(nn.Module):
    """Blocks at several depths, one of them in two places."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), DBB(4, 4, 3, padding=1))
        self.shared = ACB(4, 4, 3, padding=1)
        self.again = self.shared
        self.stages = nn.ModuleDict(dict(a=RepVGGConv(4, 4, 3, padding=1)))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.stem(x)
        x = self.again(torch.relu(self.shared(x)))
        return self.norm(self.stages['a'](x))


@pytest.fixture
def net():
    return randomize(Net().double()).eval()


X = image(2, 3, 6, 7)
NAMES = ['stem.1', 'shared', 'again', 'stages.a']


def storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors}


def test_find_blocks(net):
    found = find_blocks(net)
    assert list(found) == NAMES
    assert found['again'] is found['shared']


def test_copy(net):
    expected = net(X)
    state = copy.deepcopy(net.state_dict())
    merged = reparameterize(net)
    assert merged is not net
    assert distance(merged(X), expected) < EXACT
    # The original is what it was, and shares nothing with the copy.
    assert torch.equal(net(X), expected)
    assert len(blocks_of(net)) == 3
    assert all(torch.equal(v, state[n]) for n, v in net.state_dict().items())
    assert not storages(net) & storages(merged)


def test_inplace(net):
    expected = net(X)
    norm = net.norm
    merged = reparameterize(net, inplace=True)
    assert merged is net and net.norm is norm
    assert distance(net(X), expected) < EXACT


@pytest.mark.parametrize('inplace', [True, False])
def test_nothing_of_ours_is_left(net, inplace):
    merged = reparameterize(net, inplace=inplace)
    for module in merged.modules():
        assert not type(module).__module__.startswith('mmdbb')
    for name in NAMES:
        assert type(merged.get_submodule(name)) is nn.Conv2d
    assert not find_blocks(merged)


@pytest.mark.parametrize('inplace', [True, False])
def test_shared_blocks_stay_shared(net, inplace):
    merged = reparameterize(net, inplace=inplace)
    assert merged.again is merged.shared


@pytest.mark.parametrize('inplace', [True, False])
def test_shared_blocks_are_merged_once(net, inplace, monkeypatch):
    merged, to_conv = [], ReparamConv2d.to_conv

    def counted(block, *args):
        merged.append(block)
        return to_conv(block, *args)

    monkeypatch.setattr(ReparamConv2d, 'to_conv', counted)
    expected = [net.stem[1], net.shared, net.stages['a']]
    reparameterize(net, inplace=inplace)
    assert len(merged) == 3
    assert all(a is b for a, b in zip(merged, expected))


def test_merge_is_not_trivial(net):
    kernel = net.shared.branches['kxk'].conv.weight
    merged = reparameterize(net)
    assert distance(merged.shared.weight, kernel) > 0.01
    assert merged.shared.bias.abs().max() > 0.01


@pytest.mark.parametrize('inplace', [True, False])
def test_model_that_is_a_block(inplace):
    block = randomize(DBB(3, 4, 3).double()).eval()
    conv = reparameterize(block, inplace=inplace)
    assert type(conv) is nn.Conv2d
    assert distance(conv(X), block(X)) < EXACT


def test_official_classes():
    model = nn.Sequential(DiverseBranchBlock(3, 4, 3, nonlinear=nn.ReLU()))
    model = randomize(model.double()).eval()
    expected = model(X)
    merged = reparameterize(model)
    assert not blocks_of(merged)
    assert distance(merged(X), expected) < EXACT


def test_blocks_merged_in_place_are_replaced_too(net):
    expected = net(X)
    net.shared.switch_to_deploy()
    merged = reparameterize(net)
    assert type(merged.shared) is nn.Conv2d
    assert distance(merged(X), expected) < EXACT


@pytest.mark.parametrize(
    'model', [nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU()), nn.Sequential()]
)
def test_model_without_blocks_is_refused(model):
    kind = type(model).__name__
    with pytest.raises(ValueError, match=f'{kind} has no block to merge'):
        reparameterize(model)


def test_merging_twice_is_refused(net):
    merged = reparameterize(net)
    with pytest.raises(ValueError, match='merged already'):
        reparameterize(merged)


@pytest.mark.parametrize('inplace', [True, False])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_not_finite_names_the_block_and_changes_nothing(net, inplace, value):
    # The last one, so that others would be merged before it.
    net.stages['a'].branches['1x1'].norm.bias.data[1] = value
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match='cannot merge stages.a: .*finite'):
        reparameterize(net, inplace=inplace)
    assert len(blocks_of(net)) == 3
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), state[name].nan_to_num())


def test_not_finite_block_alone():
    block = DBB(3, 4, 3)
    block.branches['kxk'].norm.running_var.fill_(float('nan'))
    with pytest.raises(ValueError, match='cannot merge the block'):
        reparameterize(block)


@pytest.mark.parametrize('inplace', [True, False])
def test_dtype_to_compose_in(inplace):
    net = randomize(Net()).eval()
    expected = net.shared.to_conv(torch.float32)
    other = net.shared.to_conv(torch.float64)
    merged = reparameterize(net, inplace, dtype=torch.float32)
    assert torch.equal(merged.shared.weight, expected.weight)
    assert not torch.equal(merged.shared.weight, other.weight)


def test_unknown_dtype_is_refused(net):
    with pytest.raises(ValueError, match='dtype must be'):
        reparameterize(net, dtype=torch.bfloat16)
    assert len(blocks_of(net)) == 3


def test_no_random_numbers_are_drawn(net):
    state = torch.get_rng_state()
    reparameterize(net)
    assert torch.equal(torch.get_rng_state(), state)


def test_mode_and_hooks_stay():
    net = Net().train()
    net.stem[0].eval()
    merged = reparameterize(net)
    assert merged.training and merged.shared.training
    assert not merged.stem[0].training


def test_is_exported():
    assert mmdbb.reparameterize is reparameterize


# literal_forward


def test_literal_forward_sums_branches(net, monkeypatch):
    calls = []
    literal = DBB.forward_branches

    def counted(self, x):
        calls.append(self)
        return literal(self, x)

    monkeypatch.setattr(DBB, 'forward_branches', counted)
    with literal_forward(net) as same:
        assert same is net
        y = net(X)
    assert net.stem[1] in calls
    assert distance(net(X), y) < EXACT


def test_literal_forward_ends(net):
    with pytest.raises(KeyError), literal_forward(net):
        assert 'forward_train' in vars(net.shared)
        raise KeyError
    for block in blocks_of(net):
        assert 'forward_train' not in vars(block)


def test_literal_forward_passes_merged_blocks_by(net):
    net.shared.switch_to_deploy()
    expected = net(X)
    with literal_forward(net):
        assert distance(net(X), expected) < EXACT
