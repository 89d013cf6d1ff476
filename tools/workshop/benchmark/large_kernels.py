# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A large depthwise kernel in training and evaluation, beside a plain one."""

from __future__ import annotations

import time
from typing import Callable, Dict, Iterator, NamedTuple

import torch
from torch import Tensor, nn

from mmdbb.blocks.build import registered_blocks
from workshop.benchmark.measure import interleaved, kept_megabytes


class KernelRow(NamedTuple):
    """One variant of a depthwise convolution and its norms.

    Attributes:
        size: Height and width of the kernel in taps.
        variant: ``plain``, a convolution and one norm; ``literal``, the
            branches one by one; or ``default``.
        train_ms: Fastest training step in milliseconds; on a CPU the time
            that the process worked.
        kept_mb: Megabytes kept for the backward pass.
        eval_ms: Fastest forward pass in eval mode, before merging.
    """

    size: int
    variant: str
    train_ms: float
    kept_mb: float
    eval_ms: float


#: Channels, and pixels a side: as in the third stage of UniRepLKNet-T.
WIDTH, SIDE = 320, 14


def large_kernels(
    block: str, sizes: tuple, batch: int, device: torch.device, repeats: int
) -> Iterator[KernelRow]:
    """Measure a depthwise block of each size, its variants in turns.

    Args:
        block: Name of the block.
        sizes: Heights and widths of the kernels in taps.
        batch: Number of images.
        device: Where to run.
        repeats: How often each variant runs.
    """
    for size in sizes:
        args = dict(padding=size // 2, groups=WIDTH, bias=False)
        layer = registered_blocks()[block](WIDTH, WIDTH, size, **args)
        conv = nn.Conv2d(WIDTH, WIDTH, size, **args)
        plain = nn.Sequential(conv, nn.BatchNorm2d(WIDTH)).to(device)
        x = torch.randn(batch, WIDTH, SIDE, SIDE, device=device)
        yield from _rows(size, layer.to(device), plain, x, repeats)


def _rows(
    size: int, layer: nn.Module, plain: nn.Module, x: Tensor, repeats: int
) -> Iterator[KernelRow]:
    x.requires_grad_()
    forwards = dict(
        plain=lambda: plain(x),
        literal=lambda: layer.forward_branches(x),
        default=lambda: layer(x),
    )

    def step(forward: Callable) -> Callable:
        return lambda: forward().mean().backward()

    steps = {name: step(forward) for name, forward in forwards.items()}
    train = _fastest(steps, x.device, repeats)
    kept = {name: kept_megabytes(run) for name, run in forwards.items()}
    for net in (plain, layer):
        net.eval()
    with torch.no_grad():
        evaluation = _fastest(forwards, x.device, repeats)
    for name in forwards:
        yield KernelRow(size, name, train[name], kept[name], evaluation[name])


def _fastest(
    runs: Dict[str, Callable], device: torch.device, repeats: int
) -> Dict[str, float]:
    clock = time.process_time if device.type == 'cpu' else None
    found = interleaved(runs, repeats, clock)
    return {name: spread.fastest for name, spread in found.items()}
