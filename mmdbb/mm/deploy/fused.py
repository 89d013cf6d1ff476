# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Fold norms into convolutions, and give merged biases a place everywhere.

This form of a network needs no place for a bias in the stock network: its
convolutions have one wherever the trained network needs it. A config cannot
say so, but the names in the checkpoint do, and
:func:`mmdbb.mm.deploy.load.give_structure_` reads them.
"""

from __future__ import annotations

import torch
from torch import nn

from mmdbb.folding import fold_norm_, is_foldable
from mmdbb.modules import is_known
from mmdbb.reparam import find_blocks
from mmdbb.stock_weights import names_in
from mmdbb.untouched import Pairs, folded_by_order


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
    which may be another than the order of the data. Here such a norm is folded
    only if it alone reads the convolution's output, too. (No others are, so
    that mmcv's function gives the structure to whoever has no mmdbb.)

    Args:
        model: A network without blocks, in eval mode.
        pairs: Name of a convolution -> names of the norms that alone read its
            output.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    # A convolution that stands in several places counts once.
    readers = [
        n for conv, norms in pairs.items() if conv in modules for n in norms
    ]
    for conv_name, norm_name in list(folded_by_order(model)):
        conv, norm = modules[conv_name], modules[norm_name]
        if (
            pairs.get(conv_name) != (norm_name,)
            or readers.count(norm_name) > 1
            or not is_foldable(norm)
            or not is_known(conv)
        ):
            continue
        fold_norm_(conv, norm)
        parent, _, name = norm_name.rpartition('.')
        model.get_submodule(parent).add_module(name, nn.Identity())
