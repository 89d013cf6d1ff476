# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The batch norms inside branches.

They are real ``nn.BatchNorm2d`` modules, so that hosts freeze, synchronise
and average them as any norm. What mmdbb adds stands outside of them: which
norms can be merged, how one is run while a checkpointed segment is computed
again, and what one makes of a zero-padded border.
"""

from __future__ import annotations

from typing import Optional

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.geometry import ConvSpec, border_mask, pad2d
from mmdbb.transforms import ScaleShift, bn_scale_shift

# The forward passes whose eval form is known to be a scale and a shift.
_KNOWN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def build_branch_norm(norm_cfg: Optional[dict], channels: int) -> _BatchNorm:
    """Build a norm that can be merged into the convolution before it.

    Args:
        norm_cfg: Config of the norm, ``dict(type='BN')`` by default.
        channels: Number of channels.

    Raises:
        ValueError: If it is not a batch norm, keeps no running statistics or
            computes something of its own.
    """
    norm_cfg = dict(type='BN') if norm_cfg is None else norm_cfg
    norm = build_norm_layer(norm_cfg, channels)[1]
    reason = None
    if not isinstance(norm, _BatchNorm):
        reason = 'it is not a batch norm'
    elif not norm.track_running_stats:
        reason = (
            'without running statistics its function depends on the batch '
            '(track_running_stats=False)'
        )
    elif type(norm).forward not in _KNOWN_FORWARDS:
        reason = f'{type(norm).__name__} overrides forward()'
    if reason:
        raise ValueError(
            f'norm_cfg={norm_cfg} cannot be merged into a convolution: '
            f"{reason}. Allowed: 'BN', 'SyncBN' and subclasses that keep "
            'their forward(), with track_running_stats=True'
        )
    return norm


def run_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Run a norm; its running statistics see each batch once.

    Gradient checkpointing computes a segment again during the backward pass.
    A second update would count the batch twice and move the border of the
    sequential branches, which is padded from the running statistics, so that
    gradients would belong to another function than the loss.

    Args:
        norm: The norm.
        x: Images of shape (N, C, H, W).

    Returns:
        Tensor: Of the same shape.
    """
    if norm.training and _in_backward():
        buffers = dict(norm._buffers)
        norm._buffers.update({k: b.clone() for k, b in buffers.items()})
        try:
            return norm(x)
        finally:
            norm._buffers.update(buffers)
    return norm(x)


@torch.no_grad()
def update_running_stats(
    norm: _BatchNorm, mean: Tensor, var: Tensor, count: int
) -> None:
    """Update a norm's running statistics as its own forward pass would.

    Args:
        norm: A norm in training mode.
        mean: Mean of the batch, shape (channels,).
        var: Biased variance of the batch, shape (channels,).
        count: Values a channel that they were taken over.
    """
    if _in_backward():
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # cumulative average
        momentum = 1 / norm.num_batches_tracked.item()
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var * (count / (count - 1)), momentum)


def norm_scale_shift(norm: _BatchNorm) -> ScaleShift:
    """What a norm computes in eval mode, differentiable in its parameters."""
    return bn_scale_shift(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )


def norm_then_pad(norm: _BatchNorm, x: Tensor, spec: ConvSpec) -> Tensor:
    """Run a norm, then pad its output for the kernel that follows.

    A zero-padded border is filled with what the running statistics make of a
    zero, without a gradient, as the DBB paper's code does. In training mode
    these are the statistics after this step's update.

    Args:
        norm: The norm.
        x: Images of shape (N, C, H, W).
        spec: Gives the pads and the padding mode.

    Returns:
        Tensor: Shape (N, C, H + top + bottom, W + left + right).
    """
    y = run_norm(norm, x)
    if not any(spec.pads):
        return y
    padded = pad2d(y, spec.pads, spec.padding_mode)
    if spec.padding_mode != 'zeros':
        return padded
    with torch.no_grad():
        value = norm_scale_shift(norm).shift.to(y.dtype)
    return torch.where(
        border_mask(y, spec.pads), value.reshape(1, -1, 1, 1), padded
    )


# torch 2.1 has no torch.compiler.is_compiling.
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)


def is_recording() -> bool:
    """Whether torch writes down the operations to run them without us.

    That is compiling and exporting, and the older tracing of
    ``torch.jit.trace``, whose shapes are no numbers.
    """
    return is_compiling() or torch.jit.is_tracing()


def _in_backward() -> bool:
    return not is_compiling() and torch._C._current_graph_task_id() != -1
