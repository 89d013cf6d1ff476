"""Blocks under torch.compile, in two processes, with SyncBN."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import EXACT, distance, image, randomize

from mmdbb import ACB, DBB, OREPARepVGG, RepVGGConv


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('kind', [DBB, ACB, OREPARepVGG, RepVGGConv])
def test_compiled_whole(kind, groups):
    """One graph, in training and in eval mode, and the same arithmetic."""
    block = randomize(kind(4, 4, 3, padding=1, groups=groups).double())
    literal = copy.deepcopy(block)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend='aot_eager')
    for training in (True, False):
        block.train(training), literal.train(training)
        x = image(2, 4, 11, 12).requires_grad_()
        y = image(2, 4, 11, 12).requires_grad_()
        a, b = compiled(x), literal.forward_branches(y)
        assert distance(a, b) < EXACT
        weight = image(*a.shape, seed=1)
        (a * weight).sum().backward()
        (b * weight).sum().backward()
        assert distance(x.grad, y.grad) < EXACT
        scale = max(p.grad.abs().max() for p in literal.parameters())
        for p, q in zip(block.parameters(), literal.parameters()):
            assert (p.grad - q.grad).abs().max() < EXACT * scale
            p.grad = q.grad = None
        for p, q in zip(block.buffers(), literal.buffers()):
            assert distance(p, q) < EXACT
        with torch.no_grad():
            assert distance(compiled(x), literal.forward_branches(y)) < EXACT


PROCESS = """
import json, os, sys, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import mmdbb

rank = int(sys.argv[1])
dist.init_process_group(
    'gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(
    mmdbb.DBB(3, 8, 3, padding=1), nn.ReLU(),
    mmdbb.DBB(8, 8, 3, padding=1, groups=8), nn.ReLU(),
    mmdbb.OREPAConv(8, 8, 3, padding=1), nn.BatchNorm2d(8)).double()
torch.manual_seed(1)
halves = torch.randn(2, 4, 3, 9, 11, dtype=torch.float64)

def step(net, x):
    net.zero_grad()
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()

single = []
for half in halves:
    alone = __import__('copy').deepcopy(model)
    step(alone, half)
    single.append([p.grad for p in alone.parameters()])
parallel = DistributedDataParallel(model)
step(parallel, halves[rank])
apart = max(
    ((a + b) / 2 - p.grad).abs().max().item()
    for a, b, p in zip(*single, model.parameters()))
largest = max(p.grad.abs().max().item() for p in model.parameters())
step(parallel, halves[rank])  # finds nothing in its way
if rank == 0:
    print(json.dumps(dict(apart=apart, largest=largest)))
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    """DDP's gradients are the means of what each process finds alone."""
    meeting = tmp_path / 'meeting'
    processes = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', PROCESS, rank, meeting],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ('0', '1')
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert not any(p.returncode for p in processes), outputs
    found = json.loads(outputs[0][0])
    assert found['apart'] < EXACT * found['largest']
