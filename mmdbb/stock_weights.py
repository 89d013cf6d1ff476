# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Weights for the stock network, so that it equals a network with blocks.

The stock network is the one without blocks. Its convolutions have no bias
where a norm follows, so the merged bias folds into that norm, or into each of
several: ``mean -= bias``. If the block had absorbed the norm, the stock
network's norm gets weight 1, bias b, mean 0 and variance 1 - eps: it adds b
and changes nothing else.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any, Callable, Dict, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.base import zero_bias
from mmdbb.errors import UserError
from mmdbb.found_norms import FoundNorms, find_norms
from mmdbb.modules import drops_bias, names_of, takes_bias
from mmdbb.reparam import find_blocks, reparameterize

State = Dict[str, Tensor]


@torch.no_grad()
def stock_state(
    model: nn.Module,
    stock: nn.Module,
    norms: Optional[FoundNorms] = None,
    dtype: torch.dtype = torch.float64,
) -> Dict[str, Tensor]:
    """Merge a network's blocks and make the weights of the stock network.

    Args:
        model: The network with blocks; unchanged.
        stock: The stock network, whose names and norms are looked up.
        norms: The norms behind the convolutions of ``stock``; by default
            :func:`~mmdbb.found_norms.find_norms` finds them.
        dtype: Precision in which kernels are composed, ``torch.float64`` or
            ``torch.float32``.

    Returns:
        dict: A state dict that ``stock`` loads strictly, with the versions of
        its layers (``_metadata``).

    Raises:
        UserError: If a merged bias has no place in the stock network.
        ValueError: If the model has no blocks.
    """
    merged = reparameterize(model, dtype=dtype, also_own=False)
    norms = find_norms(stock) if norms is None else norms
    expected: Any = stock.state_dict()  # with torch's _metadata
    modules = dict(stock.named_modules(remove_duplicate=False))
    names = names_of(stock)
    renamed = names_in(stock, merged)
    state: Any = OrderedDict(
        (renamed(n), v) for n, v in merged.state_dict().items()
    )
    state._metadata = expected._metadata
    places = {
        renamed(name)
        for name, module in merged.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Identity)
    }
    changed: Dict[str, Tensor] = {}
    for name in map(renamed, find_blocks(model)):
        # OREPA blocks built with bias=False merge without one; count it as 0.
        state.setdefault(f'{name}.bias', zero_bias(state[f'{name}.weight']))
        bias = state[f'{name}.bias']
        behind: Sequence[str] = norms.pairs.get(name, ())
        if f'{name}.bias' in expected:
            # A bias *and* a norm, as in VGG: the convolution takes the bias,
            # and if the block had absorbed the norm, it now changes nothing.
            behind = [norm for norm in behind if norm in places]
            bias = torch.zeros_like(bias)
        else:
            del state[f'{name}.bias']
            if not behind and bias.any():
                raise UserError(_no_place(name, _why(norms, name)))
        for norm in behind:
            for alias in names[modules[norm]]:
                changed.update(
                    _norm_with_bias(name, alias, modules[norm], bias, state)
                )
    state.update(changed)
    return state


def _norm_with_bias(
    conv: str, name: str, norm: nn.Module, bias: Tensor, state: State
) -> State:
    """Entries of a norm that takes the bias of the convolution before it.

    Args:
        conv: Name of the convolution.
        name: Name of the norm.
        norm: The norm in the stock network.
        bias: The merged bias, in the precision of the blocks.
        state: The merged network's entries. They lack the norm's if the block
            had absorbed it.

    Raises:
        UserError: If the norm cannot take it.
    """
    mean = f'{name}.running_mean'
    if takes_bias(norm):
        if mean in state:
            exact = state[mean].double() - bias.double()
            return {mean: exact.to(state[mean].dtype)}
        if isinstance(norm, _BatchNorm):
            return norm_that_adds(bias, norm, name)
    elif drops_bias(norm) or not bias.any():
        return {}
    kind = type(norm).__name__
    raise UserError(
        _no_place(
            conv,
            f'{name} behind it is of type {kind}, which keeps no running mean',
        )
    )


def _no_place(name: str, why: str) -> str:
    return (
        f'the bias of the merged {name} has no place in the stock network: '
        f'its convolution has none, and {why}. Merge into another form, by '
        '--format fused or onnx, or leave the block by --skip; before a '
        'training there are more ways, see docs/any_config.md'
    )


def _why(norms: FoundNorms, name: str) -> str:
    if name not in norms.unreached:
        return (
            'no norm alone reads its output (a norm that reads something '
            'else too cannot take it)'
        )
    return (
        'no norm with running statistics is known to follow '
        f'({norms.reason or "by the names of attributes"})'
    )


def names_in(stock: nn.Module, model: nn.Module) -> Callable[[str], str]:
    """Find out how names of a model translate into those of the stock network.

    The names are the same, but for the deep stem of ResNets: mmpretrain has
    three modules of convolution, norm and activation there, mmdet and mmseg
    have one sequence of nine layers.

    Args:
        stock: The stock network.
        model: The network with blocks, merged or not.

    Returns:
        Callable: Translates the name of a module or entry.
    """
    known = {name for name, _ in stock.named_modules()}
    others = tuple(
        name[: -len('2.conv')]
        for name, _ in model.named_modules()
        if name.endswith('stem.2.conv') and name not in known
    )
    return lambda n: stem_in_sequence(n) if n.startswith(others) else n


def stem_in_sequence(name: str) -> str:
    """Translate a deep stem's name in mmpretrain into mmdet's and mmseg's.

    Args:
        name: Name of a module or entry. A name outside of a deep stem stays.
    """
    match = re.fullmatch(r'((?:.*\.)?)stem\.([012])\.(conv|bn)(\.\w+)?', name)
    if not match:
        return name
    number = 3 * int(match[2]) + (match[3] == 'bn')
    return f'{match[1]}stem.{number}{match[4] or ""}'


def norm_that_adds(
    bias: Tensor, norm: _BatchNorm, name: str
) -> Dict[str, Tensor]:
    """Make the state of a norm that in eval mode just adds a bias.

    Args:
        bias: The bias to add, shape (channels,).
        norm: The norm, whose eps is used. Without a weight and a bias it
            subtracts a mean of minus the bias.
        name: Name of the norm, under which the entries stand.

    Returns:
        dict: Entries for a state dict.

    """
    counted: Any = norm.num_batches_tracked  # it keeps statistics
    entries = dict(
        running_mean=torch.zeros_like(bias),
        running_var=torch.full_like(bias, 1 - norm.eps),
        num_batches_tracked=torch.zeros_like(counted),
    )
    if norm.affine:
        entries.update(weight=torch.ones_like(bias), bias=bias)
    else:
        entries['running_mean'] = -bias
    return {f'{name}.{entry}': value for entry, value in entries.items()}
