# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""How one block's time and memory grow with batch, width and resolution."""

from __future__ import annotations

from typing import Callable, Iterator, NamedTuple, Optional

import torch
from mmcv.cnn import build_conv_layer
from torch import Tensor, nn

from mmdbb.blocks import BranchSumConv2d
from workshop.benchmark.measure import interleaved, kept_megabytes
from workshop.benchmark.papers import papers_way


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
    batch=(1, 2, 4, 8, 16, 32),
    width=(32, 64, 128, 256, 512),
    resolution=(4, 7, 14, 28, 56, 112),
)
BASE = dict(batch=16, width=64, resolution=28)


def growth(block: str, device: torch.device, repeats: int) -> Iterator[Point]:
    """Time and memory of one block as batch, width and resolution grow."""
    for axis, values in AXES.items():
        for value in values:
            size = dict(BASE, **{axis: value})
            width, side = size['width'], size['resolution']
            layer = _with_norm(dict(type=block), width).to(device)
            plain = _with_norm(None, width).to(device)
            x = torch.randn(size['batch'], width, side, side, device=device)
            yield from _points(axis, value, layer, plain, x, repeats)


def _with_norm(cfg: Optional[dict], width: int) -> nn.Module:
    """A 3x3 convolution, and a norm unless the block has its own."""
    args = dict(padding=1, bias=False)
    layer = build_conv_layer(cfg, width, width, 3, **args)
    if isinstance(layer, BranchSumConv2d):
        return layer
    return nn.Sequential(layer, nn.BatchNorm2d(width))


def _points(
    axis: str,
    value: int,
    layer: nn.Module,
    plain: nn.Module,
    x: Tensor,
    repeats: int,
) -> Iterator[Point]:
    x.requires_grad_()
    forwards = dict(
        plain=lambda: plain(x),
        literal=lambda: _literally(layer, x),
        default=lambda: layer(x),
    )

    def step(forward: Callable) -> Callable:
        return lambda: forward().mean().backward()

    times = interleaved({n: step(f) for n, f in forwards.items()}, repeats)
    for name, forward in forwards.items():
        yield Point(
            axis, value, name, times[name].median, kept_megabytes(forward)
        )


def _literally(layer: nn.Module, x: Tensor) -> Tensor:
    with papers_way(layer):
        return layer(x)
