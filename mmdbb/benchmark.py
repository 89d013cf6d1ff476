# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What blocks cost: plain, literal and default, measured in one run.

*plain* is the stock network, *literal* the network with blocks whose branches
are computed one by one as in the papers' code, *default* what mmdbb runs. The
runs of all variants are interleaved, so that a busy machine slows all of them
alike, and ratios are what counts.
"""

from __future__ import annotations

import statistics
import time
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from mmcv.cnn import fuse_conv_bn
from mmpretrain.models import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.backbones import MobileNetV1, MobileNetV1DBB, ResNetDBB
from mmdbb.blocks import BranchSumConv2d
from mmdbb.branches import PointwiseKxK
from mmdbb.reparam import find_blocks, literal_forward, reparameterize

NETWORKS: Dict[str, Tuple[Callable, Callable]] = {
    'resnet18': (
        lambda: ResNet(18),
        lambda block: ResNetDBB(18, block=block),
    ),
    'resnet50': (
        lambda: ResNet(50),
        lambda block: ResNetDBB(50, block=block),
    ),
    'resnet101': (
        lambda: ResNet(101),
        lambda block: ResNetDBB(101, block=block),
    ),
    'mobilenet': (MobileNetV1, lambda block: MobileNetV1DBB(block=block)),
}

#: What can be measured, see :func:`run_phase`.
PHASES = ('train', 'frozen', 'eval', 'deploy', 'merge')


class Spread(NamedTuple):
    """Times of one variant over interleaved runs, in milliseconds."""

    median: float
    fastest: float
    slowest: float


class Row(NamedTuple):
    """One variant of one phase.

    Attributes:
        phase: One of :data:`PHASES`.
        variant: ``plain``, ``literal``, ``default``, ``merged``, ...
        time: Milliseconds over the interleaved runs.
        kept_mb: Megabytes that autograd keeps for the backward pass, counted
            with saved-tensor hooks; None where there is no backward pass.
        peak_mb: Largest sum of live allocations of one run in megabytes.
    """

    phase: str
    variant: str
    time: Spread
    kept_mb: float | None
    peak_mb: float | None


def run_phase(
    phase: str,
    network: str,
    block: str,
    images: Tensor,
    repeats: int,
    compiled: bool = False,
) -> List[Row]:
    """Measure one phase of one network.

    Args:
        phase: ``train`` (forward and backward, norms in training mode),
            ``frozen`` (the same with norms in eval mode), ``eval`` (forward
            of the unmerged network), ``deploy`` (forward of the merged one)
            or ``merge`` (merging itself).
        network: One of :data:`NETWORKS`.
        block: Name of a branch-sum block.
        images: Batch of shape (N, 3, H, W) on the device to measure.
        repeats: How many interleaved runs.
        compiled: Whether plain and default run under ``torch.compile``.

    Returns:
        list: A row for each variant.
    """
    make_plain, make_blocks = NETWORKS[network]
    torch.manual_seed(0)
    plain = make_plain().to(images.device)
    model = make_blocks(dict(type=block)).to(images.device)
    if phase == 'merge':
        return _merge_rows(model, repeats)
    if phase == 'deploy':
        variants = _deploy_variants(plain, model, images, compiled)
    else:
        variants = _block_variants(phase, plain, model, images, compiled)
    times = interleaved(
        {name: run for name, (run, _) in variants.items()}, repeats
    )
    with_backward = phase in ('train', 'frozen')
    return [
        Row(
            phase,
            name,
            times[name],
            kept_megabytes(forward) if with_backward else None,
            peak_megabytes(run, images.device),
        )
        for name, (run, forward) in variants.items()
    ]


def interleaved(
    runs: Dict[str, Callable[[], None]], repeats: int
) -> Dict[str, Spread]:
    """Time callables in turns, after one run each to warm up."""
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(_seconds(run))
    return {
        name: Spread(
            1e3 * statistics.median(values),
            1e3 * min(values),
            1e3 * max(values),
        )
        for name, values in seconds.items()
    }


def kept_megabytes(forward: Callable[[], object]) -> float:
    """What autograd keeps of a forward pass; each storage counts once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # Holding the tensor keeps its address from being used again.
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(size for size, _ in storages.values()) / 1e6


def peak_megabytes(run: Callable[[], None], device: torch.device) -> float:
    """Largest sum of live allocations while a callable runs."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == '[memory]'
    ]
    live = peak = 0
    for _, size in sorted(events):
        live += size
        peak = max(peak, live)
    return peak / 1e6


def _block_variants(
    phase: str,
    plain: nn.Module,
    model: nn.Module,
    images: Tensor,
    compiled: bool,
) -> Dict[str, Tuple[Callable, Callable]]:
    for net in (plain, model):
        net.train(phase != 'eval')
        if phase == 'frozen':
            _freeze_norms(net)
    fast = torch.compile(model, fullgraph=True) if compiled else model
    plain = torch.compile(plain, fullgraph=True) if compiled else plain

    def runs(net: Callable) -> Tuple[Callable, Callable]:
        def forward():
            return net(images)[0]

        def step():
            forward().mean().backward()
            model.zero_grad()

        def evaluate():
            with torch.no_grad():
                forward()

        return (evaluate if phase == 'eval' else step), forward

    def literally(function: Callable) -> Callable:
        def run():
            with literal_forward(model):
                return function()

        return run

    literal = tuple(literally(f) for f in runs(model))
    return dict(plain=runs(plain), literal=literal, default=runs(fast))


def _deploy_variants(
    plain: nn.Module, model: nn.Module, images: Tensor, compiled: bool
) -> Dict[str, Tuple[Callable, Callable]]:
    model.train(False)
    plain.train(False)
    merged = reparameterize(model)
    fused = fuse_conv_bn(reparameterize(model))
    nets = dict(plain=plain, merged=merged, fused=fused)
    if compiled:
        nets = {n: torch.compile(m, fullgraph=True) for n, m in nets.items()}

    def evaluate(net: nn.Module) -> Callable:
        def run():
            with torch.no_grad():
                net(images)

        return run

    return {name: (evaluate(net),) * 2 for name, net in nets.items()}


def _merge_rows(model: nn.Module, repeats: int) -> List[Row]:
    runs = {
        'group by group': lambda: _merge_group_by_group(model),
        'default': lambda: reparameterize(model),
    }
    times = interleaved(runs, repeats)
    return [Row('merge', n, t, None, None) for n, t in times.items()]


@torch.no_grad()
def _merge_group_by_group(model: nn.Module) -> None:
    """Compose each block's kernel with a loop over groups for the 1x1-KxK.

    For comparison: a merge as in the papers' code, where a grouped
    convolution's product of kernels is taken one group after the other.
    """
    for block in find_blocks(model).values():
        block.get_equivalent_kernel_bias()
        for branch in block.branches.values():
            if not isinstance(branch, PointwiseKxK):
                continue
            groups = branch.spec.groups
            products = [
                nn.functional.conv2d(second, first.permute(1, 0, 2, 3))
                for first, second in zip(
                    branch.kernel1.chunk(groups),
                    branch.conv2.weight.chunk(groups),
                )
            ]
            torch.cat(products)


def _freeze_norms(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _seconds(run: Callable[[], None]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# ------------------------------------------------------------------ growth


class Point(NamedTuple):
    """One block at one size.

    Attributes:
        axis: What varies: ``batch``, ``width`` or ``resolution``.
        value: Its value (images, channels or pixels a side).
        variant: ``plain``, ``literal`` or ``default``.
        ms: Median time of a training step in milliseconds.
        kept_mb: Megabytes kept for the backward pass.
    """

    axis: str
    value: int
    variant: str
    ms: float
    kept_mb: float


#: What the curves vary, and the values of what they do not.
AXES = dict(
    batch=(4, 8, 16, 32),
    width=(32, 64, 128, 256),
    resolution=(14, 28, 56, 112),
)
BASE = dict(batch=16, width=64, resolution=28)


def growth(block: str, device: torch.device, repeats: int) -> Iterator[Point]:
    """Time and memory of one block as batch, width and resolution grow."""
    from mmcv.cnn import build_conv_layer

    for axis, values in AXES.items():
        for value in values:
            size = dict(BASE, **{axis: value})
            width, side = size['width'], size['resolution']
            layer = build_conv_layer(
                dict(type=block), width, width, 3, padding=1
            ).to(device)
            plain = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            ).to(device)
            x = torch.randn(size['batch'], width, side, side, device=device)
            yield from _points(axis, value, layer, plain, x, repeats)


def _points(
    axis: str,
    value: int,
    layer: BranchSumConv2d,
    plain: nn.Module,
    x: Tensor,
    repeats: int,
) -> Iterator[Point]:
    x.requires_grad_()
    forwards = dict(
        plain=lambda: plain(x),
        literal=lambda: layer.forward_branches(x),
        default=lambda: layer(x),
    )

    def step(forward: Callable) -> Callable:
        return lambda: forward().mean().backward()

    times = interleaved({n: step(f) for n, f in forwards.items()}, repeats)
    for name, forward in forwards.items():
        yield Point(
            axis, value, name, times[name].median, kept_megabytes(forward)
        )
