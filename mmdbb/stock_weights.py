# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Weights for the stock network, so that it equals a network with blocks.

The stock network is the one without blocks. Its convolutions have no bias
where a norm follows, so the merged bias folds into that norm:
``mean -= bias``. If the block had absorbed the norm, the stock network's norm
gets weight 1, bias b, mean 0 and variance 1 - eps: it adds b and changes
nothing else.
"""

from __future__ import annotations

import re
from typing import Callable, Dict, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.base import zero_bias
from mmdbb.conv_norms import norm_names
from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks, reparameterize


@torch.no_grad()
def stock_state(
    model: nn.Module,
    stock: nn.Module,
    pairs: Optional[Dict[str, str]] = None,
    dtype: torch.dtype = torch.float64,
) -> Dict[str, Tensor]:
    """Merge a network's blocks and make the weights of the stock network.

    Args:
        model: The network with blocks; unchanged.
        stock: The stock network, whose names and norms are looked up.
        pairs: Name of a convolution -> name of the norm behind it; by default
            found by the conventions of OpenMMLab's packages.
        dtype: Precision in which kernels are composed, ``torch.float64`` or
            ``torch.float32``.

    Returns:
        dict: A state dict that ``stock`` loads strictly.

    Raises:
        UserError: If a merged bias has no place in the stock network.
        ValueError: If the model has no blocks.
    """
    merged = reparameterize(model, dtype=dtype, also_own=False)
    expected = stock.state_dict()
    stock_modules = dict(stock.named_modules())
    pairs = norm_names(merged) if pairs is None else pairs
    renamed = names_in(stock, merged)
    modules = {renamed(n): m for n, m in merged.named_modules()}
    state = {renamed(n): v for n, v in merged.state_dict().items()}
    pairs = {renamed(conv): renamed(norm) for conv, norm in pairs.items()}
    for name in map(renamed, find_blocks(model)):
        norm_name = pairs.get(name)
        norm = stock_modules.get(norm_name)
        # OREPA blocks built with bias=False merge without one; count it as 0.
        state.setdefault(f'{name}.bias', zero_bias(state[f'{name}.weight']))
        if f'{name}.bias' in expected:
            # A bias *and* a norm, as in VGG: the convolution takes the bias,
            # and if the block had absorbed the norm, it now changes nothing.
            absorbed = isinstance(modules.get(norm_name), nn.Identity)
            if absorbed and isinstance(norm, _BatchNorm):
                nothing = torch.zeros_like(state[f'{name}.bias'])
                state.update(norm_that_adds(nothing, norm, norm_name))
            continue
        bias = state.pop(f'{name}.bias')
        if not isinstance(norm, _BatchNorm) or not norm.track_running_stats:
            if not bias.any():
                continue
            raise UserError(
                f'the bias of the merged {name} has no place in the stock '
                'network: its convolution has none, and no batch norm with '
                'running statistics is known to follow'
            )
        mean = f'{norm_name}.running_mean'
        if mean in state:
            exact = state[mean].to(dtype) - bias.to(dtype)
            state[mean] = exact.to(state[mean].dtype)
        else:
            state.update(norm_that_adds(bias, norm, norm_name))
    return state


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
        norm: The norm, whose eps is used.
        name: Name of the norm, under which the entries stand.

    Returns:
        dict: Entries for a state dict.

    Raises:
        UserError: If the norm has no weight and bias.
    """
    if not norm.affine:
        raise UserError(
            f'the stock network has no place for the bias before {name}: '
            'that norm has affine=False'
        )
    return {
        f'{name}.weight': torch.ones_like(bias),
        f'{name}.bias': bias,
        f'{name}.running_mean': torch.zeros_like(bias),
        f'{name}.running_var': torch.full_like(bias, 1 - norm.eps),
        f'{name}.num_batches_tracked': torch.zeros_like(
            norm.num_batches_tracked
        ),
    }
