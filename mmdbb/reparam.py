# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merge the blocks of a model. No other file walks a model to merge it."""

from __future__ import annotations

import contextlib
import copy
from typing import Dict, Iterator, Optional, Tuple

import torch
from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.modules import computes_weight
from mmdbb.own_blocks import merge_own_blocks
from mmdbb.ports import PORTS

__all__ = ['find_blocks', 'literal_forward', 'reparameterize']

# Where torch keeps hooks. Those on a block move to the convolution that takes
# its place.
_FORWARD_HOOKS = (
    '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs',
    '_forward_hooks',
    '_forward_hooks_with_kwargs',
    '_forward_hooks_always_called',
)


def _hand_hooks_on(block: nn.Module, conv: nn.Module) -> None:
    hooks = {**block._forward_pre_hooks, **block._forward_hooks}
    done = {key for key, hook in hooks.items() if computes_weight(hook)}
    for kind in _FORWARD_HOOKS:
        kept = getattr(block, kind).items()
        getattr(conv, kind).update({k: h for k, h in kept if k not in done})


def find_blocks(model: nn.Module) -> Dict[str, ReparamConv2d]:
    """Find all blocks of a model, by name.

    Blocks that were merged in place (``switch_to_deploy``) are found too. A
    block that stands in several places is listed under each of its names.
    """
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ReparamConv2d)
    }


def reparameterize(
    model: nn.Module,
    inplace: bool = False,
    dtype: torch.dtype = torch.float64,
    also_own: Optional[bool] = None,
) -> nn.Module:
    """Replace every block by the plain ``nn.Conv2d`` that it equals.

    All kernels are composed and checked before the first block is replaced.
    Blocks of other packages, such as timm's MobileOne, are merged by their own
    methods, and each is compared with the block that it was.

    Args:
        model: A model with blocks, or a block.
        inplace: Whether to change the model itself instead of a copy.
        dtype: Precision in which kernels are composed, ``torch.float64`` or
            ``torch.float32``. The convolutions have the dtype of their
            blocks.
        also_own: Whether to merge blocks of other packages too; by default
            only if the model has none of mmdbb's. See
            :mod:`mmdbb.own_blocks`.

    Returns:
        nn.Module: The merged model. If ``model`` is itself a block, the
        convolution.

    Raises:
        ValueError: If the model has no blocks, a merged kernel is not
            finite, a block's own method is wrong, or ``dtype`` is another
            one; the model is then unchanged.

    Examples:
        >>> from mmdbb import DBB
        >>> model = nn.Sequential(DBB(3, 8, 3), nn.ReLU())
        >>> type(reparameterize(model)[0]).__name__
        'Conv2d'
    """
    blocks = find_blocks(model)
    if also_own or (also_own is None and not blocks):
        return _with_own_merged(model, inplace, dtype)
    if not blocks:
        raise _no_block(model)
    convs = {}
    for name, block in blocks.items():
        if block in convs:
            continue
        try:
            convs[block] = conv = block.to_conv(dtype)
            _hand_hooks_on(block, conv)
        except ValueError as error:
            raise ValueError(
                f'cannot merge {name or "the block"}: {error}'
            ) from error
    if model in convs:
        return convs[model]
    if not inplace:
        # Blocks are replaced while copying, so that they are never copied.
        return copy.deepcopy(model, {id(b): c for b, c in convs.items()})
    for parent, attribute, block in list(_places(model)):
        setattr(parent, attribute, convs[block])
    return model


def _with_own_merged(
    model: nn.Module, inplace: bool, dtype: torch.dtype
) -> nn.Module:
    """Merge mmdbb's blocks, then those of other packages around them."""
    has_blocks = bool(find_blocks(model))
    merged = model
    if has_blocks:
        merged = reparameterize(model, dtype=dtype, also_own=False)
    try:
        found = merge_own_blocks(merged)
    except ValueError as error:
        if not has_blocks:
            raise
        raise ValueError(
            f'{error}. Methods of other packages do not expect the biases of '
            "merged blocks: where mmdbb's blocks stand inside others, merge "
            'them first into the network without them, by merge_into_'
        ) from error
    if not has_blocks and not found.blocks:
        raise _no_block(model)
    if found.not_compared:
        PORTS.log(
            'merged, but not compared with what they were, because they need '
            f'more than one tensor: {", ".join(found.not_compared)}'
        )
    if not inplace:
        return found.model
    if type(found.model) is not type(model):
        raise ValueError(
            f'{type(model).__name__} itself becomes another layer, which '
            'inplace=True cannot do'
        )
    vars(model).update(vars(found.model))
    return model


def _no_block(model: nn.Module) -> ValueError:
    return ValueError(
        f'{type(model).__name__} has no block to merge: it is merged '
        'already, or was built without mmdbb'
    )


@contextlib.contextmanager
def literal_forward(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context, blocks compute each branch by itself.

    Verification needs it: in eval mode a block runs its merged kernel, so
    without this both sides of the comparison would compute the same thing.

    Args:
        model: The model, which the context returns.
    """
    blocks = [
        block for block in find_blocks(model).values() if not block.deploy
    ]
    for block in blocks:
        block.forward_train = block.forward_branches
    try:
        yield model
    finally:
        for block in blocks:
            vars(block).pop('forward_train', None)


def _places(
    model: nn.Module,
) -> Iterator[Tuple[nn.Module, str, ReparamConv2d]]:
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, ReparamConv2d):
                yield parent, attribute, child
