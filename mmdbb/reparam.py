# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merge the blocks of a model. No other file walks a model to merge it."""

from __future__ import annotations

import contextlib
import copy
import re
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.modules import computes_weight
from mmdbb.own_blocks import merge_own_blocks
from mmdbb.ports import PORTS

__all__ = ['find_blocks', 'literal_forward', 'reparameterize']

#: Matches names of entries that only a block has that is not merged.
_OF_A_BLOCK = re.compile(
    r'\bbranches\.(?!\d+\.)\w+\.'  # HRNet's branches have numbers
    r'|\bgenerator\.(layers\.\d+\.)?(origin|scale|scales\.\w+)$'
)

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


def holds_blocks(state: Dict[str, Tensor], model: nn.Module) -> bool:
    """Whether weights come from a network with blocks that are not merged.

    Args:
        state: Names -> tensors.
        model: The network to load them into. They may come from another
            network with blocks, too: then the names of branches tell.
    """
    blocks = find_blocks(model)
    inside = tuple(f'{name}.' for name in blocks)
    outside = {n for n in model.state_dict() if not n.startswith(inside)}
    own = {
        f'{name}.{entry}' if name else entry
        for name, block in blocks.items()
        if not block.deploy
        for entry in own_of(block)
    }
    return any(
        name in own or (name not in outside and _OF_A_BLOCK.search(name))
        for name in state
    )


def own_of(block: ReparamConv2d) -> List[str]:
    """Names of a block's entries that a plain convolution does not have."""
    return [n for n in block.state_dict() if n not in ('weight', 'bias')]


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
    convs: Dict[nn.Module, nn.Module] = {}
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
    new = {**convs, **dict(_empty_places(model))}
    if not inplace:
        # Blocks are replaced while copying, so that they are never copied.
        return copy.deepcopy(model, {id(m): n for m, n in new.items()})
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child in new:
                setattr(parent, attribute, new[child])
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
        own: Any = block
        own.forward_train = block.forward_branches
    try:
        yield model
    finally:
        for block in blocks:
            vars(block).pop('forward_train', None)


def _empty_places(
    model: nn.Module,
) -> Iterator[Tuple[nn.Module, nn.Module]]:
    """Places of absorbed norms, and what stays there: nothing of mmdbb."""
    for module in model.modules():
        if isinstance(module, AbsorbedNorm):
            yield module, nn.Identity().train(module.training)
