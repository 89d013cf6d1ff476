"""Blocks on a GPU: exact, without waiting for it, in the modes of training.

Skipped where there is none. `pytest -m gpu tests` runs these, and the few
that stand beside their kin on the CPU.
"""

import copy

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from registered import each_block, keeps_its_kernel
from torch import nn

from mmdbb import DBB, reparameterize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
]
GEOMETRIES = pytest.mark.parametrize(
    'arguments',
    [
        dict(in_channels=32, out_channels=32),
        dict(in_channels=32, out_channels=64, stride=2),
        dict(in_channels=32, out_channels=32, groups=32),
        dict(in_channels=32, out_channels=32, dilation=2),
    ],
    ids=['dense', 'strided', 'depthwise', 'dilated'],
)
PRECISIONS = torch.float32, torch.bfloat16, torch.float16


def built(kind, arguments, seed=0):
    padding = arguments.get('dilation', 1)
    block = kind(kernel_size=3, padding=padding, **arguments)
    return randomize(block, seed)


def images(batch=8, seed=0, dtype=torch.float64):
    """Enough pixels for the fast way."""
    return image(batch, 32, 29, 30, seed=seed, dtype=dtype)


def step(forward, block, x, weight, dtype=None):
    """Output and gradients of one step, in float64 on the CPU."""
    x = x.clone().requires_grad_()
    half = dtype not in (None, torch.float32)
    with torch.autocast(x.device.type, dtype or torch.half, enabled=half):
        y = forward(x)
    (y * weight.to(y)).sum().backward()
    found = {f'grad {n}': p.grad for n, p in block.named_parameters()}
    found.update(block.named_buffers())
    found.update(output=y.detach(), input=x.grad)
    return {k: v.double().cpu() for k, v in found.items()}


@each_block()
@GEOMETRIES
def test_a_step_equals_the_literal_sum_of_the_cpu(kind, arguments):
    for training in (True, False):
        block = built(kind, arguments).double().train(training)
        gpu = copy.deepcopy(block).cuda()
        x = images()
        weight = image(*copy.deepcopy(block)(x).shape, seed=5)
        expected = step(block.forward_branches, block, x, weight)
        found = step(gpu, gpu, x.cuda(), weight.cuda())
        assert_near(found, expected)


def assert_near(found, expected):
    """A gradient is measured by the largest of all."""
    scale = max(v.abs().max() for k, v in expected.items() if 'grad' in k)
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        largest = scale if 'grad' in name else value.abs().max()
        assert error <= EXACT * largest, name


@each_block()
@GEOMETRIES
def test_precision_is_that_of_the_literal_sum(kind, arguments, monkeypatch):
    """At most 1.5 times its error, or a twentieth of a step of the dtype."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    for dtype in PRECISIONS:
        least = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps / 20
        sums = squared_errors(kind, arguments, dtype)
        for name, values in sums.items():
            theirs, ours, scale = values.sqrt().tolist()
            assert ours <= 1.5 * theirs + least * scale, (dtype, name)


def squared_errors(kind, arguments, dtype):
    """By name: of the literal sum, of the default, and what they are of."""
    sums = {}
    for seed in range(4):
        block = built(kind, arguments, seed)
        x = images(seed=seed).relu().to(dtype).float()
        shape = copy.deepcopy(block)(x).shape
        weight = image(*shape, seed=seed + 9) / 64
        weight = weight.to(dtype).float()
        exact = copy.deepcopy(block).double()
        exact = step(
            exact.forward_branches, exact, x.double(), weight.double()
        )
        theirs, ours = (copy.deepcopy(block).cuda() for _ in range(2))
        x, weight = x.cuda(), weight.cuda()
        theirs = step(theirs.forward_branches, theirs, x, weight, dtype)
        ours = step(ours, ours, x, weight, dtype)
        for name, value in exact.items():
            errors = [(t[name] - value).norm() for t in (theirs, ours)]
            errors = torch.stack([*errors, value.norm()]).square()
            sums[name] = sums.get(name, 0) + errors
    return sums


@each_block()
@GEOMETRIES
def test_nothing_waits_for_the_gpu(kind, arguments):
    """No number is read back, not even to decide something."""
    for dtype in PRECISIONS:
        for mode in ('training', 'frozen'):
            block = built(kind, arguments).cuda().train(mode == 'training')
            x = images(dtype=torch.float32).cuda()
            x.requires_grad_()
            train(block, x, dtype)  # chooses algorithms
            torch.cuda.set_sync_debug_mode('error')
            try:
                train(block, x, dtype)
            finally:
                torch.cuda.set_sync_debug_mode('default')


def train(block, x, dtype):
    with torch.autocast('cuda', dtype, enabled=dtype is not torch.float32):
        y = block(x)
    y.float().sum().backward()


@each_block(keeps_its_kernel)
@torch.no_grad()
def test_the_kept_kernel_is_never_stale(kind, monkeypatch):
    """Though a GPU compares all values at once; a capture compares none."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    block = built(kind, dict(in_channels=32, out_channels=32)).cuda().eval()
    x = images(dtype=torch.float32).cuda()
    for tensor in [*block.parameters(), *block.buffers()]:
        if not tensor.is_floating_point():
            continue
        tensor.data.add_(0.25)  # no version counter sees this
        kept = block(x), block(x)
        expected = block.forward_branches(x)
        for y in kept:
            assert distance(y, expected) < 1e-4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    tensor.data.add_(0.25)
    graph.replay()
    assert distance(y, block.forward_branches(x)) < 1e-4


@each_block()
def test_channels_last_stays(kind):
    arguments = dict(in_channels=32, out_channels=32)
    block = built(kind, arguments).cuda()
    block = block.to(memory_format=torch.channels_last)
    x = images(dtype=torch.float32).cuda()
    x = x.to(memory_format=torch.channels_last)
    with torch.autocast('cuda', torch.float16):
        y = block(x)
        merged = block.eval()(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert merged.is_contiguous(memory_format=torch.channels_last)


@each_block()
@pytest.mark.parametrize('groups', [1, 32])
def test_a_captured_step_can_be_replayed(kind, groups):
    """CUDA graphs: the second replay is the third step."""
    arguments = dict(in_channels=32, out_channels=32, groups=groups)
    block = built(kind, arguments).double().cuda()
    literal = copy.deepcopy(block)
    x = images().cuda().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    block.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
        y.square().mean().backward()
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        literal.zero_grad()
        expected = literal.forward_branches(x)
        expected.square().mean().backward()
    torch.cuda.synchronize()
    assert distance(y, expected) < EXACT
    scale = max(p.grad.abs().max() for p in literal.parameters())
    for p, q in zip(block.parameters(), literal.parameters()):
        assert (p.grad - q.grad).abs().max() < EXACT * scale
    for p, q in zip(block.buffers(), literal.buffers()):
        assert distance(p.double(), q.double()) < EXACT


@each_block()
@pytest.mark.parametrize('groups', [1, 32])
def test_inductor(kind, groups):
    """Two steps of torch.compile, against the literal sum."""
    arguments = dict(in_channels=32, out_channels=32, groups=groups)
    block = built(kind, arguments).double().cuda()
    literal = copy.deepcopy(block)
    torch.compiler.reset()
    net = torch.compile(block, fullgraph=True)
    weight = image(8, 32, 29, 30, seed=5).cuda()
    for seed in range(2):
        x = images(seed=seed).cuda()
        found = step(net, block, x, weight)
        expected = step(literal.forward_branches, literal, x, weight)
    assert_near(found, expected)


def test_grad_scaler_trains_as_with_the_literal_sum():
    losses = {}
    for literal in (True, False):
        torch.manual_seed(0)
        block = DBB(32, 32, 3, padding=1)
        network = nn.Sequential(block, nn.ReLU(), nn.Conv2d(32, 4, 1)).cuda()
        if literal:
            block.forward_train = block.forward_branches
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler('cuda', init_scale=2.0**30)
        x = images(dtype=torch.float32).cuda()
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast('cuda', torch.float16):
                loss = (network(x) - x[:, :4]).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses[literal] = loss.item()
        assert scaler.get_scale() < 2.0**30  # it has skipped steps
    assert losses[False] == pytest.approx(losses[True], rel=0.01)


@each_block(keeps_its_kernel)
def test_merging_there_is_merging_here(kind):
    block = built(kind, dict(in_channels=32, out_channels=32)).eval()
    expected = reparameterize(nn.Sequential(block))[0]
    found = reparameterize(nn.Sequential(block).cuda())[0]
    assert found.weight.is_cuda
    assert distance(found.weight.cpu(), expected.weight) < 1e-6
    assert distance(found.bias.cpu(), expected.bias) < 1e-6
