"""What branches add to the merged kernel, against their own responses."""

import copy
import math

import pytest
import torch
from helpers import EXACT, distance, randomize
from registered import each_block, is_composed, sums_several
from torch import nn

from mmdbb import DBB, OREPAConv, QARepVGGConv, RepVGGConv, reparameterize
from mmdbb.shares import branch_kernels, branch_shares, model_shares


def response(function, size=(3, 2), channels=4):
    """The kernel of a map, from its outputs for one pixel at a time."""
    pixels = torch.eye(channels * size[0] * size[1]).double()
    images = pixels.reshape(-1, channels, *size)
    shifted = function(images) - function(torch.zeros_like(images[:1]))
    return shifted.flatten(1).t().reshape(-1, channels, *size).detach()


def built(kind, **kwargs):
    return randomize(kind(4, 4, (3, 2), **kwargs)).double().eval()


@each_block(sums_several)
def test_kernels_are_the_branches_responses(kind):
    block = built(kind)
    norm = block.norm or nn.Identity()
    found = branch_kernels(block)
    assert list(found) == list(block.branches)
    for name, branch in block.branches.items():
        expected = response(lambda x, branch=branch: norm(branch(x)))
        assert distance(found[name], expected) < EXACT, name
    whole = sum(found.values())
    assert distance(whole, response(block.forward_branches)) < EXACT


@each_block(is_composed)
def test_kernels_of_a_composed_one_are_its_rows_responses(kind):
    block = built(kind)
    found = branch_kernels(block)
    before = copy.deepcopy(block.state_dict())
    for i, name in enumerate(found):
        alone = copy.deepcopy(block)
        rest = [row for row in range(len(found)) if row != i]
        alone.generator.scale.data[rest] = 0
        expected = response(alone.forward_branches)
        assert distance(found[name], expected) < EXACT, name
    assert len(found) == len(block.generator.scale)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # none was written to


def test_names_of_the_rows():
    """The 1x1 is a tap, the average is flat, and the rest is dense."""
    block = built(OREPAConv)
    generator, found = block.generator, branch_kernels(block)
    assert 'kxk' in found and '1x1_kxk' in found and 'separable' in found
    assert (found['1x1'] != 0).sum((2, 3)).max() == 1
    flat = found['1x1_avg'].flatten(2)
    assert distance(flat, flat[..., :1].expand_as(flat)) < EXACT
    scaled = generator.origin * generator.scale[0].reshape(-1, 1, 1, 1)
    assert distance(found['kxk'], scaled) < EXACT


def test_numbers_by_hand():
    """Two 1x1 convolutions without norms: vectors (3, 0) and (3, 4)."""
    branches = [dict(type='kxk', norm=False)] * 2
    block = DBB(2, 1, 1, bias=False, branches=branches, norm_cfg=None)
    for name, values in dict(kxk=(3.0, 0.0), kxk_2=(3.0, 4.0)).items():
        weight = block.branches[name].conv.weight
        weight.data.copy_(torch.tensor(values).reshape(1, 2, 1, 1))
    shares = branch_shares(block)
    first, second = shares.branches['kxk'], shares.branches['kxk_2']
    assert shares.norm == pytest.approx(math.sqrt(52))
    assert (first.norm, second.norm) == (3, 5)
    assert first.share == pytest.approx(3 / math.sqrt(52))
    assert first.projection == pytest.approx(18 / 52)
    assert second.projection == pytest.approx(34 / 52)
    assert first.cosines == pytest.approx(dict(kxk_2=0.6))
    assert second.cosines == pytest.approx(dict(kxk=0.6))


def test_branches_that_cancel():
    branches = [dict(type='kxk', norm=False)] * 2
    block = DBB(2, 3, 3, bias=False, branches=branches)
    first, second = block.branches.values()
    second.conv.weight.data.copy_(-first.conv.weight.data)
    for share in branch_shares(block).branches.values():
        assert share.share == math.inf
        assert list(share.cosines.values()) == pytest.approx([-1])
    first.conv.weight.data.zero_()
    shares = branch_shares(block).branches
    assert shares['kxk'].share == shares['kxk'].projection == 0
    assert math.isnan(shares['kxk'].cosines['kxk_2'])
    second.conv.weight.data.zero_()
    assert math.isnan(branch_shares(block).branches['kxk'].share)


def test_a_stack_is_one_branch():
    shares = branch_shares(OREPAConv(2, 2, 7))
    assert list(shares.branches) == ['kernel']
    assert shares.branches['kernel'].share == 1
    assert shares.branches['kernel'].cosines == {}


def test_of_a_model():
    shared = RepVGGConv(4, 4, 3, padding=1)
    model = nn.Sequential(DBB(3, 4, 3), shared, nn.ReLU(), shared)
    merged = reparameterize(QARepVGGConv(4, 4, 3))
    model.append(merged)
    found = model_shares(model.half())
    assert list(found) == ['0', '1']
    assert found['1'] == branch_shares(shared)
    shared.branches['1x1'].conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r'^1: .*hook'):
        model_shares(model)


def test_what_has_no_branches_to_measure():
    with pytest.raises(TypeError, match='got a Conv2d'):
        branch_shares(nn.Conv2d(2, 2, 3))
    block = DBB(2, 2, 3)
    block.switch_to_deploy()
    with pytest.raises(ValueError, match='is merged: it has no branches to'):
        branch_shares(block)
    with pytest.raises(ValueError, match='meta device'):
        branch_shares(DBB(2, 2, 3, device='meta'))
