"""torch.compile with inductor, its default: gradients as the literal sum's.

Its partitioner decides what is kept and what is computed again, and once read
running statistics after their update.
"""

import copy
import os

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from registered import distinct_blocks
from torch import nn
from torch.utils.checkpoint import checkpoint

BLOCKS = distinct_blocks()


class Shared(nn.Module):
    """A block that reads two batches before one backward pass."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, y):
        return self.block(x), self.block(y)


class Segment(Shared):
    """A block in a checkpointed segment."""

    def forward(self, x):
        return (checkpoint(self.block, x, use_reentrant=False),)


def losses(outputs):
    weights = [image(*y.shape, seed=i + 7) for i, y in enumerate(outputs)]
    return sum((y * w).sum() for y, w in zip(outputs, weights))


def compare(net, block, literal, xs):
    """Two steps, so that the second one's border has moved."""
    ours = [x.clone().requires_grad_() for x in xs]
    theirs = [x.clone().requires_grad_() for x in xs]
    for _ in range(2):
        losses(net(*ours)).backward()
        losses([literal.forward_branches(x) for x in theirs]).backward()
    for x, y in zip(ours, theirs):
        assert distance(x.grad, y.grad) < EXACT
    scale = max(p.grad.abs().max() for p in literal.parameters())
    for (name, p), q in zip(block.named_parameters(), literal.parameters()):
        assert (p.grad - q.grad).abs().max() < EXACT * scale, name
    for (name, p), q in zip(block.named_buffers(), literal.buffers()):
        assert distance(p.double(), q.double()) < EXACT, name


class Alone(Shared):
    """A block that reads one batch."""

    def forward(self, x):
        return (self.block(x),)


#: Alone, one block of each way to compute stands for the others, which are
#: compiled with `make test-compiled`: a C++ compiler takes its time.
ALONE = ['OREPA', 'QARepVGGConv']
if 'MMDBB_ALL_COMPILED' in os.environ:
    ALONE = [name for name in BLOCKS if name != 'DBB']
CASES = [
    ('DBB', 1, Shared),
    ('DBB', 1, Segment),
    ('DBB', 8, Alone),
    *((name, 1, Alone) for name in ALONE),
]


@pytest.mark.parametrize('name, groups, kind', CASES)
def test_inductor(name, groups, kind):
    if kind is Segment:
        # Then the forward and the backward graph round differently.
        torch.set_num_threads(2)
    block = BLOCKS[name](8, 8, 3, padding=1, groups=groups)
    block = randomize(block).double()
    literal = copy.deepcopy(block)
    torch.compiler.reset()
    net = torch.compile(kind(block), fullgraph=True)
    xs = [image(3, 8, 13, 12), 2 * image(3, 8, 13, 12, seed=1)]
    compare(net, block, literal, xs[: 1 + (kind is Shared)])


def test_rounding_tells_no_batches_apart():
    """Graphs of one batch round its means each in its own way.

    Before, the border came from whichever graph rounded alike: with two
    threads, from a block that had been compiled earlier.
    """
    keep = torch.ops.mmdbb.from_forward
    means = torch.linspace(0.1, 3, 8, dtype=torch.float64)
    near = torch.full((8,), 1.0)
    keep(means, near)
    keep(means * (1 + 4 * torch.finfo(means.dtype).eps), 2 * near)
    keep(means * (1 + 1e-9), 3 * near)  # another batch
    found = []
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda _: found.append(keep(means, near)))
    y.sum().backward()
    assert torch.equal(found[0], 2 * near)


def test_inductor_under_autocast():
    """No further from float64 than twice what the literal sum is."""
    block = randomize(BLOCKS['DBB'](8, 8, 3, padding=1))
    exact, literal = copy.deepcopy(block).double(), copy.deepcopy(block)
    torch.compiler.reset()
    net = torch.compile(block, fullgraph=True)
    x = image(4, 8, 14, 15).relu().bfloat16()
    weight = image(4, 8, 14, 15, seed=3).float()
    errors = []
    for run in (net, literal.forward_branches):
        with torch.autocast('cpu', torch.bfloat16):
            y = run(x)
        (y.float() * weight).sum().backward()
    (exact.forward_branches(x.double()) * weight).sum().backward()
    for p, q, r in zip(*(m.parameters() for m in (block, literal, exact))):
        errors.append([(t.grad - r.grad).norm().item() for t in (p, q)])
    ours, theirs = torch.tensor(errors).square().sum(0).sqrt().tolist()
    assert ours <= 2 * theirs


def test_a_backward_pass_after_another_forward_pass_of_a_segment_raises():
    """What torch.compile cannot serve with a checkpoint it does not hide."""
    block = randomize(BLOCKS['DBB'](4, 4, 3, padding=1)).double()
    torch.compiler.reset()
    net = torch.compile(Segment(block), backend='aot_eager', fullgraph=True)
    xs = [image(2, 4, 8, 9), image(2, 4, 8, 9, seed=1)]
    loss = sum(losses(net(x.requires_grad_())) for x in xs)
    with pytest.raises(RuntimeError, match='modified by an inplace'):
        loss.backward()
