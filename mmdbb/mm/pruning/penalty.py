# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Penalties on equivalent kernels, which training sees as part of the loss.

What is deployed is a block's merged kernel, so that is what is asked to be
small: no penalty on the kernels of branches says the same, because branches
may cancel. The group lasso over filters is that of Wen et al., "Learning
Structured Sparsity in Deep Neural Networks", NeurIPS 2016, sec. 3.2
(https://arxiv.org/abs/1608.03665).
"""

from __future__ import annotations

import functools
import re
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.mm.host_internals import replace, take_back
from mmdbb.reparam import find_blocks


def l1(kernel: Tensor) -> Tensor:
    """Sum of magnitudes: single weights become zero.

    Args:
        kernel: Shape (out, in / groups, kH, kW).
    """
    return kernel.abs().sum()


def group_lasso(kernel: Tensor) -> Tensor:
    """Sum of the filters' lengths: whole filters become zero.

    Each is weighted by the square root of its number of weights, so that
    filters of all sizes are asked for alike.

    Args:
        kernel: Shape (out, in / groups, kH, kW).
    """
    filters = kernel.flatten(1)
    # At zero a length has no gradient; this one's is zero there.
    lengths = torch.linalg.vector_norm(filters, dim=1)
    return filters.shape[1] ** 0.5 * lengths.sum()


KINDS: Dict[str, Callable[[Tensor], Tensor]] = dict(
    l1=l1, group_lasso=group_lasso
)


def penalized_blocks(
    model: nn.Module, layers: Optional[Sequence[str]] = None
) -> Dict[str, ReparamConv2d]:
    """The blocks that a penalty is for.

    Args:
        model: A model with blocks.
        layers: Regular expressions, searched for in the blocks' names; by
            default all blocks.

    Raises:
        ValueError: If the model has no blocks, or an expression matches none.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f'{type(model).__name__} has no blocks whose kernels could be '
            'penalised'
        )
    if layers is None:
        return blocks
    if isinstance(layers, str):
        layers = [layers]
    chosen = {}
    for pattern in layers:
        found = {n: b for n, b in blocks.items() if re.search(pattern, n)}
        if not found:
            raise ValueError(
                f'layers={pattern!r} matches no block; there are, for '
                f'example: {", ".join(list(blocks)[:3])}'
            )
        chosen.update(found)
    return {name: block for name, block in blocks.items() if name in chosen}


def kernel_penalty(
    model: nn.Module,
    kind: str = 'group_lasso',
    layers: Optional[Sequence[str]] = None,
) -> Tensor:
    """How large the equivalent kernels are, differentiable.

    Args:
        model: A model with blocks.
        kind: ``l1`` or ``group_lasso``.
        layers: See :func:`penalized_blocks`.

    Returns:
        Tensor: One number.

    Raises:
        ValueError: If a value is not allowed.

    Examples:
        >>> from mmdbb import DBB
        >>> block = DBB(4, 8, 3)
        >>> kernel_penalty(block, 'l1').backward()
        >>> block.branches['1x1'].conv.weight.grad.shape
        torch.Size([8, 4, 1, 1])
    """
    if kind not in KINDS:
        raise ValueError(
            f'kind must be one of {", ".join(KINDS)}; got {kind!r}'
        )
    # A block that stands in several places counts once.
    blocks = set(penalized_blocks(model, layers).values())
    kernels = (b.get_equivalent_kernel_bias().kernel for b in blocks)
    return sum(KINDS[kind](kernel) for kernel in kernels)


@HOOKS.register_module()
class KernelPenaltyHook(Hook):
    """Adds :func:`kernel_penalty` to the loss, and to the log.

    Args:
        weight: What the penalty is multiplied by.
        kind: ``l1`` or ``group_lasso``.
        layers: See :func:`penalized_blocks`.
        begin: The iteration that it begins with, from 0.

    Examples:
        In a config: ``custom_hooks = [dict(type='KernelPenaltyHook',
        weight=1e-4)]`` with ``custom_imports =
        dict(imports=['mmdbb.prune'])``.
    """

    #: Its name in the log.
    name = 'loss_kernel'

    def __init__(
        self,
        weight: float,
        kind: str = 'group_lasso',
        layers: Optional[Sequence[str]] = None,
        begin: int = 0,
    ) -> None:
        if not weight > 0:
            raise ValueError(f'weight must be greater than 0, got {weight!r}')
        if kind not in KINDS:
            raise ValueError(
                f'kind must be one of {", ".join(KINDS)}; got {kind!r}'
            )
        self.weight, self.kind, self.layers = weight, kind, layers
        self.begin = begin

    def before_train(self, runner) -> None:
        """Put the penalty beside the losses that the model adds up."""
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        penalized_blocks(model, self.layers)  # a mistake shows at the start
        parse = model.parse_losses

        @functools.wraps(parse)
        def parse_losses(losses: dict) -> Tuple[Tensor, dict]:
            if runner.iter >= self.begin:
                penalty = kernel_penalty(model, self.kind, self.layers)
                losses = dict(losses, **{self.name: self.weight * penalty})
            return parse(losses)

        replace(model, 'parse_losses', parse_losses)

    def after_train(self, runner) -> None:
        """Leave the model as it was."""
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        take_back(model, 'parse_losses')


def filter_lengths(model: nn.Module) -> Dict[str, List[float]]:
    """How long each filter of each equivalent kernel is.

    Args:
        model: A model with blocks.

    Returns:
        dict: By block, the Euclidean length of each output channel's filter.
    """
    return {
        name: block.get_equivalent_kernel_bias()
        .kernel.detach()
        .flatten(1)
        .norm(dim=1)
        .tolist()
        for name, block in find_blocks(model).items()
    }
