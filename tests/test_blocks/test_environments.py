"""Blocks under torch.compile, in two processes, with SyncBN."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from registered import each_block
from torch.utils.flop_counter import FlopCounterMode

from mmdbb import DBB


@pytest.mark.parametrize('groups', [1, 4])
@each_block()
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

HOME = Path(__file__).resolve().parents[2]


def in_two_processes(script, tmp_path):
    """Run a script as two ranks; what the first one prints as JSON."""
    meeting = tmp_path / 'meeting'
    processes = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', script, rank, meeting],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HOME / 'tests',
            env={**os.environ, 'PYTHONPATH': str(HOME / 'tools')},
        )
        for rank in ('0', '1')
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert not any(p.returncode for p in processes), outputs
    return json.loads(outputs[0][0])


def test_two_processes(tmp_path):
    """DDP's gradients are the means of what each process finds alone."""
    found = in_two_processes(PROCESS, tmp_path)
    assert found['apart'] < EXACT * found['largest']


SYNCHRONIZED = """
import copy, functools, json, sys, torch
import torch.distributed as dist
from torch import nn
from helpers import every_batch_is_large, image, randomize
from workshop.benchmark import kept_megabytes
from mmdbb import DBB
from mmdbb.blocks.build import registered_blocks
from mmdbb.reparam import literal_forward

rank = int(sys.argv[1])
GEOMETRIES = (
    dict(in_channels=4, out_channels=4), dict(in_channels=6, out_channels=8),
    dict(in_channels=4, out_channels=4, groups=4),
    dict(in_channels=2, out_channels=16))
# Unequal batches: the pixels of all processes count, not the processes.
PART = slice(0, 3) if rank == 0 else slice(3, 5)


def images(geometry, levels):
    shapes = [(5, geometry['in_channels'], 12 - 4 * i, 13) for i in levels]
    return [(i + 1) * image(*s, seed=i) for i, s in zip(levels, shapes)]


def run(net, xs, part):
    xs = [x[part].clone().requires_grad_() for x in xs]
    ys = [net(x) for x in xs]
    weights = [image(5, *y.shape[1:], seed=9)[part] for y in ys]
    sum((y * w).sum() for y, w in zip(ys, weights)).backward()
    return ys, [x.grad for x in xs]


dist.init_process_group(
    'gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
torch.manual_seed(0)
worst = dict(output=0, input=0, grad=0, buffer=0, kept=0)


def note(what, found, expected, scale=None):
    scale = expected.abs().max() if scale is None else scale
    apart = ((found - expected).abs().max() / scale).item()
    worst[what] = max(worst[what], apart)


without_shift = functools.partial(DBB, shift=False)
for kind in (*registered_blocks().values(), without_shift):
    for geometry in GEOMETRIES:
        block = randomize(kind(kernel_size=3, padding=1, **geometry)).double()
        for levels in (range(1), range(2)):  # alone, and a shared head
            xs = images(geometry, levels)
            alone = copy.deepcopy(block)
            with literal_forward(alone):
                ys, gs = run(alone, xs, slice(None))
            scale = max(p.grad.abs().max() for p in alone.parameters())
            for literal in (False, True):
                # As mmengine's sync_bn='torch' converts a model.
                net = nn.SyncBatchNorm.convert_sync_batchnorm(
                    copy.deepcopy(block))
                if literal:
                    with literal_forward(net):
                        zs, hs = run(net, xs, PART)
                else:
                    zs, hs = run(net, xs, PART)
                for y, z, g, h in zip(ys, zs, gs, hs):
                    note('output', z, y[PART])
                    note('input', h, g[PART])
                for p, q in zip(net.parameters(), alone.parameters()):
                    dist.all_reduce(p.grad)
                    note('grad', p.grad, q.grad, scale)
                for p, q in zip(net.buffers(), alone.buffers()):
                    note('buffer', p.double(), q.double())
            if levels == range(1):
                x = xs[0][PART].clone().requires_grad_()
                net = nn.SyncBatchNorm.convert_sync_batchnorm(
                    copy.deepcopy(block))
                plain = copy.deepcopy(block)
                with every_batch_is_large():
                    ratio = kept_megabytes(
                        lambda: net(x), net) / kept_megabytes(
                        lambda: plain(x), plain)
                worst['kept'] = max(worst['kept'], ratio)
if rank == 0:
    print(json.dumps(worst))
dist.destroy_process_group()
"""


def test_sync_bn_in_two_processes(tmp_path):
    """Two processes with a part each are one with the whole batch."""
    found = in_two_processes(SYNCHRONIZED, tmp_path)
    # What is kept is what a block with plain norms keeps.
    assert found.pop('kept') < 1.2
    assert max(found.values()) < EXACT, found


def test_sync_bn_in_eval_mode_is_one_convolution():
    block = DBB(4, 4, 3, norm_cfg=dict(type='SyncBN'))
    block = randomize(block).double().eval()
    with torch.no_grad():
        block(image(2, 4, 6, 7))  # composes the kernel
        with FlopCounterMode(display=False) as counter:
            y = block(image(2, 4, 6, 7))
    found = counter.get_flop_counts()['Global']
    assert sum(found.values()) == 2 * 2 * 4 * 4 * 9 * 4 * 5
    assert distance(y, block.forward_branches(image(2, 4, 6, 7))) < EXACT


SHARDED = """
import copy, json, sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from helpers import every_batch_is_large, image, randomize
from mmdbb.blocks.build import registered_blocks
from mmdbb.reparam import literal_forward

rank = int(sys.argv[1])
dist.init_process_group(
    'gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
mesh = init_device_mesh('cpu', (2,))
torch.manual_seed(0)
blocks = [
    block(4, 4, 3, padding=1, groups=groups)
    for block in registered_blocks().values() for groups in (1, 4)]
model = randomize(nn.Sequential(*blocks)).double()
batches = [image(3, 4, 12, 13, seed=seed) for seed in (0, 1)]


def backward(net, x):
    y = net(x)
    (y * image(*y.shape, seed=9)).sum().backward()


each = []
for x in batches:
    alone = copy.deepcopy(model)
    with literal_forward(alone):
        backward(alone, x)
    each.append([p.grad for p in alone.parameters()])
expected = [(a + b) / 2 for a, b in zip(*each)]
scale = max(g.abs().max() for g in expected)
apart = {}
with every_batch_is_large():
    for kind in ('root', 'blocks', 'static graph'):
        net = copy.deepcopy(model)
        if kind == 'static graph':
            net = DistributedDataParallel(net, static_graph=True)
        else:
            for block in net if kind == 'blocks' else ():
                fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh)
        backward(net, batches[rank])
        found = [getattr(p.grad, 'full_tensor', lambda g=p.grad: g)()
                 for p in net.parameters()]
        apart[kind] = max(
            ((a - b).abs().max() / scale).item()
            for a, b in zip(found, expected))
if rank == 0:
    print(json.dumps(apart))
dist.destroy_process_group()
"""


def test_sharded_and_static_in_two_processes(tmp_path):
    """FSDP2 with and without each block sharded, DDP with a static graph."""
    pytest.importorskip('torch.distributed.fsdp', reason='needs FSDP2')
    found = in_two_processes(SHARDED, tmp_path)
    assert found.keys() == {'root', 'blocks', 'static graph'}
    assert max(found.values()) < EXACT, found
