# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Fold norms into convolutions, and give merged biases a place everywhere.

This form of a network needs no place for a bias in the stock network: its
convolutions have one wherever the trained network needs it. A config cannot
say so, but the names in the checkpoint do, and
:func:`mmdbb.mm.deploy.load.give_structure_` reads them.
"""

from __future__ import annotations

from typing import Iterator, Tuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.norm import norm_scale_shift
from mmdbb.modules import is_known
from mmdbb.reparam import find_blocks
from mmdbb.stock_weights import names_in
from mmdbb.transforms import KernelBias, fuse_conv_bn
from mmdbb.untouched import Pairs


def give_biases_(stock: nn.Module, model: nn.Module) -> None:
    """Give each convolution of the stock network the bias it will need.

    Args:
        stock: The stock network, changed in place. New biases are zero.
        model: The network with blocks.
    """
    renamed = names_in(stock, model)
    for name, block in find_blocks(model).items():
        conv = stock.get_submodule(renamed(name))
        if block.merges_with_bias and conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))


@torch.no_grad()
def fold_norms_(model: nn.Module, pairs: Pairs) -> None:
    """Fold batch norms into the convolutions before them, in place.

    As in mmcv's ``fuse_conv_bn``, ``nn.Identity`` takes the place of a folded
    norm. But mmcv goes by the order in which a module registered its layers,
    which may be another than the order of the data. Here a norm is folded
    only if it also is the one that alone reads the convolution's output.

    Args:
        model: A network without blocks, in eval mode.
        pairs: Name of a convolution -> names of the norms that alone read its
            output.
    """
    readers = [norm for norms in pairs.values() for norm in set(norms)]
    modules = dict(model.named_modules())
    for conv_name, norm_name in list(_in_order(model)):
        conv, norm = modules[conv_name], modules[norm_name]
        if (
            pairs.get(conv_name) != (norm_name,)
            or readers.count(norm_name) > 1
            or norm.running_mean is None
            or not is_known(conv)
        ):
            continue
        bias = conv.bias
        if bias is None:
            bias = conv.weight.new_zeros(conv.out_channels)
        kernel, bias = fuse_conv_bn(
            KernelBias(conv.weight, bias), norm_scale_shift(norm)
        )
        conv.weight, conv.bias = nn.Parameter(kernel), nn.Parameter(bias)
        parent, _, name = norm_name.rpartition('.')
        setattr(model.get_submodule(parent), name, nn.Identity())


def _in_order(model: nn.Module) -> Iterator[Tuple[str, str]]:
    """Names of a convolution and of the norm registered next, by mmcv's rule.

    Only these may be folded: whoever builds a folded network without mmdbb
    calls mmcv's function.
    """
    for prefix, parent in model.named_modules():
        last = None
        for name, child in parent.named_children():
            path = f'{prefix}.{name}' if prefix else name
            if isinstance(child, nn.Conv2d):
                last = path
            elif isinstance(child, _BatchNorm) and last is not None:
                yield last, path
                last = None
