"""Gradient checkpointing: the same gradients, and one update a step."""

import copy

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from registered import each_block
from torch.utils.checkpoint import checkpoint

from mmdbb.blocks import DBB
from mmdbb.branches.norm import run_norm


def step(block, x, run):
    x = x.clone().requires_grad_()
    y = run(block, x)
    (y * image(*y.shape, seed=1)).sum().backward()
    grads = {n: p.grad for n, p in block.named_parameters()}
    return y, dict(grads, input=x.grad), dict(block.named_buffers())


@each_block()
@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('groups', [1, 4])
def test_checkpointed_block(kind, reentrant, groups):
    block = randomize(kind(4, 4, 3, padding=1, groups=groups).double())
    twin = copy.deepcopy(block)
    x = image(3, 4, 5, 7)
    # Two steps: a doubled update would move the second one's border.
    for _ in range(2):
        block.zero_grad()
        twin.zero_grad()
        y, grads, buffers = step(block, x, lambda b, x: b(x))
        z, twin_grads, twin_buffers = step(
            twin,
            x,
            lambda b, x: checkpoint(b, x, use_reentrant=reentrant),
        )
        assert distance(z, y) < EXACT
        family = max(g.abs().max() for g in grads.values())
        for name, grad in grads.items():
            error = (twin_grads[name] - grad).abs().max()
            assert error <= EXACT * family, name
        for name, value in buffers.items():
            assert torch.equal(twin_buffers[name], value), name


def test_norms_keep_their_statistics_after_an_exception():
    block = DBB(4, 4, 3, padding=1)
    norm = block.branches['kxk'].norm
    mean = norm.running_mean

    def fail(grad):
        with pytest.raises(ValueError, match='expected 4D input'):
            run_norm(norm, torch.zeros(3, 4, 5))
        return grad

    x = torch.ones(1, requires_grad=True)
    x.register_hook(fail)
    (2 * x).sum().backward()
    assert norm.track_running_stats
    assert norm.running_mean is mean


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_forward_pass_that_a_hook_within_a_segment_starts(reentrant):
    """It is a new one, although the segment's own backward pass is below."""
    block = randomize(DBB(4, 4, 3, padding=1).double())
    twin, z, others = copy.deepcopy(block), image(3, 4, 5, 7, seed=2), []

    def segment(x):
        y = 2 * x
        if y.requires_grad and (reentrant or not others):
            y.register_hook(lambda grad: others.append(block(z)))
        return y.square()

    x = image(3, 4, 5, 7).requires_grad_()
    checkpoint(segment, x, use_reentrant=reentrant).sum().backward()
    assert len(others) == 1
    assert distance(others[0], twin.forward_branches(z)) < EXACT
    for name, value in twin.named_buffers():
        assert distance(block.get_buffer(name), value) < EXACT, name
