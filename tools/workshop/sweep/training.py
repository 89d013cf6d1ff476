# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""One step of training in every block of a network."""

from __future__ import annotations

import functools
import traceback
from typing import Callable, Optional

import torch
from torch import Tensor, nn

from mmdbb.blocks import ReparamConv2d
from mmdbb.compare import network_outputs
from mmdbb.reparam import find_blocks

from .inputs import Size, images_for, losses_of


def train(model: nn.Module, size: Optional[list], package: str) -> str:
    """Take a step of training in every block.

    The network's own loss is taken where its package has inputs for it, else
    the sum of its features. Blocks that get no gradient so run by themselves.

    Args:
        model: The network with blocks.
        size: Height and width of the images in pixels; None if the network
            cannot be run on images.
        package: Import name of the package whose config it is.

    Returns:
        str: What was trained on: ``'loss'``, ``'features'`` or ``'blocks
        alone'``.

    Raises:
        ValueError: If a gradient is missing; or not finite, although the
            gradient that comes to the block is.
    """
    model.train()
    losses = dict(
        loss=functools.partial(losses_of, package=package), features=_features
    )
    how = 'blocks alone'
    for name, loss in losses.items() if size else ():
        if _backward(model, loss, size):
            how = name
            break
    else:
        model.zero_grad()
    for name, block in find_blocks(model).items():
        if all(not p.requires_grad for p in block.parameters()):
            continue  # a frozen stage
        if not _has_gradient(block):
            block(_input_of(block)).square().sum().backward()
        if not _has_gradient(block):
            raise ValueError(f'{name} gets no gradient')
    unfinite = _unfinite(model)
    if unfinite:
        raise ValueError(f'{unfinite} gets a gradient that is not finite')
    return how


def _backward(model: nn.Module, loss: Callable, size: list) -> bool:
    """Compute gradients, if the network can be run so and they are finite.

    Raises:
        Exception: If a block cannot be run.
        ValueError: If a block makes a gradient that is not finite. Some
            losses do, for random boxes.
    """
    model.zero_grad()
    spoilt: set = set()

    def watch(block: nn.Module, _: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(functools.partial(see, block))

    def see(block: nn.Module, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            spoilt.add(block)

    blocks = find_blocks(model)
    hooks = [each.register_forward_hook(watch) for each in blocks.values()]
    try:
        loss(model, tuple(size)).backward()
    except Exception as error:  # not all networks can be run so
        if _is_in(error, 'mmdbb/blocks/'):
            raise
        return False
    finally:
        for hook in hooks:
            hook.remove()
    for name, block in blocks.items():
        if _unfinite(block) and block not in spoilt:
            raise ValueError(f'{name} makes a gradient that is not finite')
    return not _unfinite(model)


def _unfinite(model: nn.Module) -> str:
    """Name of a parameter whose gradient is not finite; empty if none."""
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None and not grad.isfinite().all():
            return name
    return ''


def _has_gradient(block: nn.Module) -> bool:
    grads = [p.grad for p in block.parameters() if p.grad is not None]
    return any(bool(grad.any()) for grad in grads)


def _features(model: nn.Module, size: Size) -> Tensor:
    outputs = network_outputs(model, images_for(model, size))
    return sum(each.square().mean() for each in outputs.values())


def _input_of(block: ReparamConv2d) -> Tensor:
    sizes = [
        2 * d * k + s
        for d, k, s in zip(block.dilation, block.kernel_size, block.stride)
    ]
    return torch.randn(2, block.in_channels, *sizes)


def _is_in(error: BaseException, folder: str) -> bool:
    """Whether an error came through the code of a folder."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(folder in frame.filename for frame in frames)
