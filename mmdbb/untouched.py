# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Prove that merging changed the blocks only, and that rounding is right.

Comparing outputs is not enough: behind a ReLU that gives zero, even a wrong
sign cannot be seen. So layers that no block touches must be copies, bit by bit
and with the same arguments. And the weights in a file must be the proven
weights, rounded once.
"""

from __future__ import annotations

import re
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.build import kind_of_block
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.dimensions import CONV2D
from mmdbb.errors import UserError
from mmdbb.files.sources import some
from mmdbb.found_norms import absorbed_norms, find_norms
from mmdbb.modules import is_norm, names_of
from mmdbb.reparam import find_blocks
from mmdbb.stock_weights import names_in

#: Full name of a block -> full names of the norms that may hold its bias.
Pairs = Mapping[str, Tuple[str, ...]]


def norms_of_blocks(model: nn.Module) -> Pairs:
    """The norms behind the blocks of a network, absorbed or not.

    Args:
        model: The network with blocks.
    """
    absorbed = {n: (place,) for n, place in absorbed_norms(model).items()}
    return {**find_norms(model).pairs, **absorbed}


def changed_layers(
    model: nn.Module, merged: nn.Module, norms: Optional[Pairs] = None
) -> Iterator[List[str]]:
    """Find the layers that merging replaces, each with the norm behind it.

    Args:
        model: The network with blocks.
        merged: The merged network. Norms may have been folded into
            convolutions too.
        norms: Name of a block -> names of the norms behind it; by default
            :func:`norms_of_blocks`.

    Yields:
        list: Names in ``model``: a block and, if there is one, a norm behind
        it, which may hold the merged bias; or a convolution and the norm that
        was folded into it. A block comes once for each norm behind it, under
        one of its names.
    """
    norms = norms_of_blocks(model) if norms is None else norms
    modules = dict(merged.named_modules(remove_duplicate=False))
    renamed = names_in(merged, model)
    blocks = find_blocks(model)
    first = {block: name for name, block in reversed(blocks.items())}
    for name in reversed(first.values()):
        yield from [[name, norm] for norm in norms.get(name, ())] or [[name]]
    for conv, norm in folded_by_order(model):
        # mmcv folds each norm into the convolution before it.
        folded = isinstance(modules.get(renamed(norm)), nn.Identity)
        behind = norms.get(conv, ()) if conv in blocks else ()
        if folded and norm not in behind:
            yield [conv, norm]


def folded_by_order(model: nn.Module) -> Iterator[Tuple[str, str]]:
    """The pairs that mmcv's ``fuse_conv_bn`` makes of a network.

    It folds each batch norm into the convolution registered before it.

    Args:
        model: The network, with blocks or without.

    Yields:
        tuple: Full names of a convolution, or of a block, and of a norm.
    """
    for name, parent in model.named_modules():
        if isinstance(parent, ReparamConv2d):
            continue
        last = None
        for child, module in parent.named_children():
            path = f'{name}.{child}' if name else child
            is_block = isinstance(module, ReparamConv2d)
            if is_block and kind_of_block(module) != CONV2D:
                continue  # merged it is no nn.Conv2d, which mmcv passes by
            if is_block or isinstance(module, nn.Conv2d):
                last = path
            elif isinstance(module, _BatchNorm) and last is not None:
                yield last, path
                last = None


def prove_untouched(
    model: nn.Module,
    merged: nn.Module,
    norms: Optional[Pairs] = None,
    own: Sequence[str] = (),
) -> None:
    """Raise unless all layers that merging does not replace are copies.

    Args:
        model: The network that was trained.
        merged: The network after merging, in the same precision.
        norms: Name of a block -> names of the norms behind it; by default
            :func:`norms_of_blocks`.
        own: Names of blocks of other packages that were merged too.

    Raises:
        UserError: If an entry or an argument differs, is missing or is new.
    """
    renamed = names_in(merged, model)
    left = {
        name for name, block in find_blocks(merged).items() if not block.deploy
    }
    names = names_of(model)
    changed = {
        alias
        for layers in changed_layers(model, merged, norms)
        for layer in layers
        if renamed(layers[0]) not in left
        for alias in names[model.get_submodule(layer)]
    }
    changed.update(own)
    found, others = merged.state_dict(), []
    for name, value in model.state_dict().items():
        if _is_under(name, changed):
            continue
        copy = found.get(renamed(name))
        if copy is None or copy.dtype != value.dtype:
            others.append(name)
        elif not torch.equal(copy, value):
            others.append(name)
    known = {renamed(name) for name in model.state_dict()}
    places = {renamed(layer) for layer in changed}
    others += [n for n in found if n not in known and not _is_under(n, places)]
    modules = dict(merged.named_modules())
    for name, module in model.named_modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        has_values = any(value is not None for value in tensors)
        # Layers such as pooling are defined by class and arguments alone.
        # Classes of containers differ, because the stock config names others.
        is_function = next(module.children(), None) is None and not has_values
        if not has_values and not is_function:
            continue
        other = modules.get(renamed(name))
        if isinstance(module, ReparamConv2d) or (
            # A norm behind a block must still be a norm with its arguments.
            _is_under(name, changed)
            and not (has_values and name in changed and is_norm(other))
        ):
            continue
        if isinstance(module, AbsorbedNorm) and type(other) is nn.Identity:
            continue
        if is_function and other is None:
            continue  # such layers may have other names in the stock network
        if other is None or _arguments(other) != _arguments(module):
            others.append(name)
        elif is_function and type(other) is not type(module):
            others.append(name)
    if others:
        raise UserError(
            'the merged network is no copy of the trained one where no block '
            f'is: {some(others)}; nothing written'
        )


def prove_rounded(
    written: Dict[str, Tensor],
    exact: Dict[str, Tensor],
    dtypes: Dict[str, torch.dtype],
) -> None:
    """Raise unless a file holds the proven weights, rounded once.

    Args:
        written: Entries that were read from the file.
        exact: The proven entries, before rounding.
        dtypes: Precision to which each entry should be rounded.

    Raises:
        UserError: If an entry differs; the message names some.
    """
    others = sorted(written.keys() ^ exact.keys())
    others += [
        name
        for name in exact
        if name in written
        and (
            written[name].dtype != dtypes[name]
            or not torch.equal(written[name], exact[name].to(dtypes[name]))
        )
    ]
    if others:
        raise UserError(
            'what was written is not what was proven, rounded: '
            f'{some(others)}; nothing written'
        )


def _arguments(layer: nn.Module) -> str:
    """What a layer says of its arguments, numpy's numbers as Python's.

    Networks compute some sizes by numpy; a plain convolution that mmdbb built
    has the same numbers as Python's.
    """
    return re.sub(r'\bnp\.\w+\(([^()]*)\)', r'\1', layer.extra_repr())


def _is_under(name: str, layers: set) -> bool:
    """Whether a name is one of the layers, or stands inside one.

    Args:
        name: Name of a module or entry.
        layers: Names of layers.
    """
    while name:
        if name in layers:
            return True
        name = name.rpartition('.')[0]
    return '' in layers
