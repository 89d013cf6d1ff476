# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What blocks cost: plain, literal and default, measured in one run.

*plain* is the stock network, *literal* the network with blocks computed as in
the papers' code, *default* what mmdbb runs. The runs of all variants are
interleaved, so that a busy machine slows all of them alike, and ratios are
what counts.
"""

from __future__ import annotations

from typing import Callable, Dict, List, NamedTuple, Tuple

import torch
from mmcv.cnn import fuse_conv_bn
from mmpretrain.models import RepVGG, ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from mmdbb.mm.backbones import (
    MobileNetV1,
    MobileNetV1DBB,
    ReparamRepVGG,
    ResNetDBB,
)
from mmdbb.reparam import find_blocks, reparameterize
from workshop.benchmark.measure import (
    Spread,
    captured,
    interleaved,
    kept_megabytes,
    peak_megabytes,
)
from workshop.benchmark.papers import merge_group_by_group, papers_way

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
    # Here plain is RepVGG's own block, as mmpretrain computes it.
    'repvgg-a0': (
        lambda: RepVGG('A0'),
        lambda block: ReparamRepVGG('A0', block=block),
    ),
}

#: What networks are run in.
PRECISIONS = dict(
    float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16
)

#: What can be measured, see :func:`run_phase`.
PHASES = ('train', 'frozen', 'eval', 'deploy', 'merge')


class Row(NamedTuple):
    """One variant of one phase.

    Attributes:
        phase: One of :data:`PHASES`.
        variant: ``plain``, ``literal``, ``default``, ``merged``, ...
        time: Milliseconds over the interleaved runs.
        kept_mb: Megabytes that autograd keeps for the backward pass besides
            the parameters, counted with saved-tensor hooks; None where there
            is no backward pass.
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
    precision: str = 'float32',
    graphs: bool = False,
) -> List[Row]:
    """Measure one phase of one network.

    Args:
        phase: ``train`` (forward and backward, norms in training mode),
            ``frozen`` (the same with norms in eval mode), ``eval`` (forward
            of the unmerged network), ``deploy`` (forward of the merged one)
            or ``merge`` (merging itself).
        network: One of :data:`NETWORKS`.
        block: Name of a block.
        images: Batch of shape (N, 3, H, W) on the device to measure.
        repeats: How many interleaved runs.
        compiled: Whether plain and default run under ``torch.compile``.
        precision: One of :data:`PRECISIONS`; in half precision by autocast.
        graphs: Whether to replay runs as CUDA graphs.

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
    nets = dict(plain=plain)
    half = torch.autocast(
        images.device.type,
        PRECISIONS[precision],
        enabled=precision != 'float32',
        cache_enabled=not graphs,
    )
    variants = {
        name: tuple(_within(half, function) for function in pair)
        for name, pair in variants.items()
    }
    times = interleaved(
        {
            name: captured(run) if graphs else run
            for name, (run, _) in variants.items()
        },
        repeats,
    )
    with_backward = phase in ('train', 'frozen')
    return [
        Row(
            phase,
            name,
            times[name],
            kept_megabytes(forward, nets.get(name, model))
            if with_backward
            else None,
            peak_megabytes(run, images.device),
        )
        for name, (run, forward) in variants.items()
    ]


def _within(context, function: Callable) -> Callable:
    def run():
        with context:
            return function()

    return run


def composing_bound(network: str, block: str, images: Tensor) -> float:
    """What composing kernels adds to a training step at the very least.

    Args:
        network: One of :data:`NETWORKS`.
        block: Name of a block.
        images: Batch of shape (N, 3, H, W).

    Returns:
        float: Multiplications of the plain network and of composing, over
        those of the plain network; 1 if nothing is composed while training.
        The backward pass has twice as many of both.
    """
    make_plain, make_blocks = NETWORKS[network]
    plain, model = make_plain(), make_blocks(dict(type=block))
    kernels = [
        block.generator
        for block in model.modules()
        if hasattr(block, 'generator')
    ]
    if not kernels:
        return 1.0
    plain.eval()  # norms in training mode refuse a single pixel
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain.to(images.device)(images)
        without = counter.get_total_flops()
        with papers_way(model):
            for kernel in kernels:
                kernel()
    return counter.get_total_flops() / without


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
            net.zero_grad()

        def evaluate():
            with torch.no_grad():
                forward()

        return (evaluate if phase == 'eval' else step), forward

    def literally(function: Callable) -> Callable:
        def run():
            with papers_way(model):
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
    blocks = list(find_blocks(model).values())
    runs = {
        'group by group': lambda: merge_group_by_group(model),
        'default': lambda: [b.to_conv() for b in blocks],
    }
    times = interleaved(runs, repeats)
    return [Row('merge', n, t, None, None) for n, t in times.items()]


def _freeze_norms(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
