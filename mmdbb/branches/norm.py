# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The batch norms inside branches.

They are real ``nn.BatchNorm2d`` modules (``1d``, ``3d``), so that trainers
freeze, synchronise and average them like any norm. The functions here add what
branches need: they check that a norm can be merged, run it without a second
update when a checkpointed segment is computed again, run SyncBN on CPUs, and
compute its output on a zero-padded border.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.moments import (
    BatchStats,
    near_dtype,
    stats_of,
    synchronizes,
)
from mmdbb.dimensions import NORM_TYPES, per_channel
from mmdbb.geometry import ConvSpec, border_mask, pad_images
from mmdbb.modules import is_known
from mmdbb.ports import PORTS
from mmdbb.recompute import from_forward, is_recomputing
from mmdbb.registry import NORMS
from mmdbb.scale_norm import ScaleNorm, is_sync_norm
from mmdbb.transforms import ScaleShift, bn_scale_shift


def build_branch_norm(
    norm_cfg: Optional[dict], channels: int, dims: int = 2
) -> _BatchNorm:
    """Build a norm that can be merged into the convolution before it.

    Args:
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None. With
            ``shift=False`` it becomes a :class:`ScaleNorm`. ``BN`` is the
            batch norm of as many dimensions as the images have.
        channels: Number of channels.
        dims: Number of dimensions of the images.

    Raises:
        TypeError: If ``norm_cfg`` is not a config.
        ValueError: If the config names no known norm, or the norm is not a
            batch norm, keeps no running statistics or overrides forward().
    """
    norm_cfg = dict(type='BN') if norm_cfg is None else norm_cfg
    norm = _build(norm_cfg, channels, dims)
    others = tuple(t for n, t in NORM_TYPES.items() if n != dims)
    reason = None
    if norm is None:
        reason = 'it is not a batch norm'
    elif isinstance(norm, others):
        reason = f'it does not take images of dims={dims}'
    elif not norm.track_running_stats:
        reason = (
            'without running statistics its function depends on the batch '
            '(track_running_stats=False)'
        )
    elif not is_known(norm):
        reason = f'{type(norm).__name__} overrides forward()'
    if norm is None or reason:
        raise ValueError(
            f'norm_cfg={norm_cfg} cannot be merged into a convolution: '
            f"{reason}. Allowed: 'BN', 'SyncBN' and subclasses that keep "
            'their forward(), with track_running_stats=True'
        )
    if norm_cfg.get('shift', True):
        return norm
    return ScaleNorm.like(norm, dims)


def _build(norm_cfg: dict, channels: int, dims: int) -> Optional[_BatchNorm]:
    """Build the norm that a config names; None if it is not a batch norm."""
    if not isinstance(norm_cfg, dict) or 'type' not in norm_cfg:
        raise TypeError(
            "norm_cfg must be a config such as dict(type='BN'), got "
            f'{norm_cfg!r}'
        )
    args = dict(dict(eps=1e-5), **norm_cfg)
    requires_grad = args.pop('requires_grad', True)
    layer = args.pop('type')
    args.pop('shift', None)
    if not isinstance(layer, type):
        # OpenMMLab's registry comes first: a user may have put another norm
        # under this name.
        name = layer
        layer = PORTS.find_layer(name) or NORMS.get(name)
        if name == 'BN' and layer is nn.BatchNorm2d:
            layer = NORM_TYPES[dims]
    if layer is None:
        raise ValueError(
            f'norm_cfg={norm_cfg} names no norm that is known; allowed: '
            f'{sorted(NORMS.module_dict)}, and what mmengine has registered'
        )
    if isinstance(layer, type) and not issubclass(layer, _BatchNorm):
        return None
    norm = layer(channels, **args)
    return norm.requires_grad_(requires_grad)


def norm_for(
    place: Optional[nn.Module], norm: Optional[nn.Module]
) -> Optional[nn.Module]:
    """The norm to put where another one stands.

    Trainers replace all batch norms by SyncBN (``sync_bn='torch'``). A SyncBN
    in the place of a ScaleNorm would shift again, so that one stays, and
    shares its statistics with the same processes.

    Args:
        place: The module that stands there.
        norm: The module that someone puts there.
    """
    if isinstance(place, ScaleNorm) and is_sync_norm(norm):
        place.synchronize_like(norm)
        return place
    return norm


def run_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Run a norm, and update its running statistics once per batch.

    Gradient checkpointing computes a segment again during the backward pass.
    A second update there would count the batch twice. It would also change
    the border of the sequential branches, which is padded from the running
    statistics.

    torch's SyncBatchNorm refuses images on a CPU, and a ScaleNorm alone
    knows no other processes; this function runs both.

    Args:
        norm: The norm.
        x: Images of shape (N, C, H, W).

    Returns:
        Tensor: The norm's output, of the same shape.
    """
    own = x.device.type == 'cpu' or isinstance(norm, ScaleNorm)
    if own and synchronizes(norm):
        return _run_synchronized(norm, x)
    if norm.training and is_recomputing():
        buffers: Dict[str, Any] = dict(norm._buffers)
        norm._buffers.update({k: b.clone() for k, b in buffers.items()})
        try:
            return norm(x)
        finally:
            norm._buffers.update(buffers)
    return norm(x)


def _run_synchronized(norm: _BatchNorm, x: Tensor) -> Tensor:
    scale, shift = batch_scale_shift(norm, stats_of(x, norm))
    scale, shift = (
        per_channel(t.to(near_dtype(x.dtype)), x.dim() - 2)
        for t in (scale, shift)
    )
    return torch.addcmul(shift, x, scale).to(x.dtype)


def batch_scale_shift(norm: _BatchNorm, stats: BatchStats) -> ScaleShift:
    """Write a norm in training mode as one scale and shift per channel.

    Args:
        norm: The norm. Its running statistics are updated.
        stats: Statistics of the batch that the norm reads.

    Returns:
        ScaleShift: Both of shape (channels,), in the statistics' precision.
    """
    if isinstance(norm, ScaleNorm):
        stats = stats.about_zero()
    update_running_stats(norm, stats)
    weight, bias = (
        None if t is None else t.to(stats.var.dtype)
        for t in (norm.weight, norm.bias)
    )
    return bn_scale_shift(stats.mean, stats.var, weight, bias, norm.eps)


@torch.no_grad()
def update_running_stats(norm: _BatchNorm, stats: BatchStats) -> None:
    """Update a norm's running statistics as its own forward pass would.

    Args:
        norm: A norm in training mode.
        stats: Statistics of the batch that the norm reads; of a ScaleNorm
            those about zero.
    """
    if is_recomputing() or not norm.track_running_stats:
        return
    if isinstance(norm, ScaleNorm):
        norm.update_(stats.var)
        return
    own: Any = norm  # has statistics, because it tracks them
    own.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # cumulative average
        momentum = 1 / own.num_batches_tracked.item()
    unbiased = stats.var * (stats.count / (stats.count - 1))
    dtype = own.running_mean.dtype
    own.running_mean.lerp_(stats.mean.to(dtype), momentum)
    own.running_var.lerp_(unbiased.to(dtype), momentum)


def border_value(norm: _BatchNorm, mean: Callable[[], Tensor]) -> Tensor:
    """Compute a norm's output on a zero-padded border, without a gradient.

    As in the DBB paper's code it is the output for a zero by the running
    statistics, in training mode too. There the statistics have been updated
    by this batch already.

    Args:
        norm: The norm, after it has run on the batch.
        mean: Returns the batch's mean, shape (channels,). It tells forward
            passes apart, so that a pass that is computed again gets the value
            that it had at first.

    Returns:
        Tensor: The value for each channel, shape (channels,).

    Raises:
        ValueError: If the norm has no running statistics.
    """
    if norm.running_mean is None:
        raise ValueError(
            'the border between two convolutions is padded from running '
            'statistics, and a norm inside the block has lost them: '
            f'{norm}'
        )
    with torch.no_grad():
        value = norm_scale_shift(norm).shift
        if not norm.training:
            return value
        return from_forward(mean, value, norm.running_mean)


def mean_of(x: Tensor) -> Tensor:
    """Mean of images (N, C, H, W) per channel, (C,), without a gradient."""
    over = (0, *range(2, x.dim()))
    return x.detach().mean(over, dtype=near_dtype(x.dtype))


def norm_scale_shift(norm: _BatchNorm) -> ScaleShift:
    """A norm in eval mode as scale and shift, differentiable."""
    own: Any = norm  # has statistics, or it would not be merged
    return bn_scale_shift(
        own.running_mean, own.running_var, norm.weight, norm.bias, norm.eps
    )


def norm_then_pad(
    norm: _BatchNorm,
    x: Tensor,
    spec: ConvSpec,
    border: Callable[..., Tensor] = border_value,
) -> Tensor:
    """Run a norm, then pad its output for the kernel that follows.

    With the padding mode ``zeros`` the border is filled with the norm's
    output for a zero. Only then do 1x1 and KxK merge into one kernel.

    Args:
        norm: The norm.
        x: Images of shape (N, C, H, W).
        spec: Geometry of the block, whose padding is added.
        border: Computes the value on the border, from the norm and from a
            function that returns the batch's mean.

    Returns:
        Tensor: Shape (N, C, H + top + bottom, W + left + right).
    """
    y = run_norm(norm, x)
    if not any(spec.pads):
        return y
    padded = pad_images(y, spec.pads, spec.padding_mode)
    if spec.padding_mode != 'zeros':
        return padded
    value = border(norm, lambda: mean_of(x))
    return torch.where(
        border_mask(y, spec.pads),
        per_channel(value.to(y.dtype), spec.dims),
        padded,
    )
