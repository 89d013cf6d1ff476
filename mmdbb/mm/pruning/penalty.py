# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Penalties on equivalent kernels, added to the loss in training.

Pruning removes filters of a block's merged kernel, so the penalty makes that
kernel small. A penalty on the branches' own kernels cannot do the same: large
kernels of two branches may cancel in the sum. The group lasso over filters
comes from Wen et al., "Learning Structured Sparsity in Deep Neural Networks",
NeurIPS 2016, sec. 3.2 (https://arxiv.org/abs/1608.03665).
"""

from __future__ import annotations

import functools
import re
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.mm.host_internals import replace, take_back
from mmdbb.modules import unwrapped
from mmdbb.reparam import find_blocks


def l1(kernel: Tensor) -> Tensor:
    """Sum the magnitudes of the weights; it drives single weights to zero.

    Args:
        kernel: A block's equivalent kernel, (out, in / groups, kH, kW).
    """
    return kernel.abs().sum()


def group_lasso(kernel: Tensor) -> Tensor:
    """Sum the filters' Euclidean lengths; it drives whole filters to zero.

    Each length is multiplied by the square root of the filter's number of
    weights, so that large and small filters are penalised alike.

    Args:
        kernel: A block's equivalent kernel, (out, in / groups, kH, kW).
    """
    filters = kernel.flatten(1)
    # The length of a zero filter has no gradient; torch's norm gives zero
    # there, where ``square().sum().sqrt()`` would give NaN.
    lengths = torch.linalg.vector_norm(filters, dim=1)
    return filters.shape[1] ** 0.5 * lengths.sum()


KINDS: Dict[str, Callable[[Tensor], Tensor]] = dict(
    l1=l1, group_lasso=group_lasso
)


def penalized_blocks(
    model: nn.Module, layers: Optional[Sequence[str]] = None
) -> Dict[str, ReparamConv2d]:
    """Choose the blocks to penalise.

    Args:
        model: A model with blocks.
        layers: Regular expressions. A block is chosen if one of them is found
            in its name; by default all blocks are.

    Returns:
        dict: The chosen blocks by name, in the model's order.

    Raises:
        ValueError: If the model has no blocks, or an expression matches none.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f'{type(model).__name__} has no blocks, so there are no kernels '
            'to penalise'
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
                f'layers={pattern!r} matches no block; some of their names: '
                f'{", ".join(list(blocks)[:3])}'
            )
        chosen.update(found)
    return {name: block for name, block in blocks.items() if name in chosen}


def kernel_penalty(
    model: nn.Module,
    kind: str = 'group_lasso',
    layers: Optional[Sequence[str]] = None,
) -> Tensor:
    """Sum a penalty over the equivalent kernels of a model.

    Args:
        model: A model with blocks.
        kind: The penalty of one kernel: :func:`l1` or :func:`group_lasso`, by
            name.
        layers: Regular expressions for the names of the blocks to penalise;
            by default all blocks.

    Returns:
        Tensor: A scalar. Gradients flow into all branches.

    Raises:
        ValueError: If ``kind`` is unknown, the model has no blocks, or an
            expression matches none.

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
    # A block that the model uses in several places counts once.
    blocks = set(penalized_blocks(model, layers).values())
    kernels = map(_kernel_of, blocks)
    return sum(KINDS[kind](kernel) for kernel in kernels)


@HOOKS.register_module()
class KernelPenaltyHook(Hook):
    """Adds :func:`kernel_penalty` to the loss, and to the log.

    Args:
        weight: Factor of the penalty in the loss, greater than 0.
        kind: ``l1``, which drives single weights to zero, or
            ``group_lasso``, which drives whole filters to zero.
        layers: Regular expressions for the names of the blocks to penalise;
            by default all blocks.
        begin: First iteration with the penalty, counted from 0.

    Raises:
        ValueError: If ``weight`` or ``kind`` is not allowed.

    Examples:
        In a config: ``custom_hooks = [dict(type='KernelPenaltyHook',
        weight=1e-4)]`` with ``custom_imports =
        dict(imports=['mmdbb.prune'])``.
    """

    #: The penalty's name in the log.
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
        """Wrap the model's ``parse_losses``, which adds up its losses."""
        model = unwrapped(runner.model)
        penalized_blocks(model, self.layers)  # raise now, not at ``begin``
        parse = model.parse_losses

        @functools.wraps(parse)
        def parse_losses(losses: dict) -> Tuple[Tensor, dict]:
            if runner.iter >= self.begin:
                penalty = kernel_penalty(model, self.kind, self.layers)
                losses = dict(losses, **{self.name: self.weight * penalty})
            return parse(losses)

        replace(model, 'parse_losses', parse_losses)

    def after_train(self, runner) -> None:
        """Give the model its own ``parse_losses`` back."""
        model = unwrapped(runner.model)
        take_back(model, 'parse_losses')


def filter_lengths(model: nn.Module) -> Dict[str, List[float]]:
    """Compute the length of each filter of each equivalent kernel.

    Args:
        model: A model with blocks.

    Returns:
        dict: Names of the blocks -> Euclidean lengths of the filters, one for
        each output channel.
    """
    return {
        name: _kernel_of(block).detach().flatten(1).norm(dim=1).tolist()
        for name, block in find_blocks(model).items()
    }


def _kernel_of(block: ReparamConv2d) -> Tensor:
    """A block's equivalent kernel, (out, in / groups, kH, kW).

    Torch's weight of a transposed convolution has the inputs first.
    """
    merged = block.get_equivalent_kernel_bias()
    return block.in_torchs_layout(merged).kernel
