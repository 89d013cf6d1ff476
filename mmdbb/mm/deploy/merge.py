# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to the merged network, in memory."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.branches.base import leaf_dtype
from mmdbb.conv_norms import norm_names
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import load_strictly
from mmdbb.files.sources import some
from mmdbb.mm.deploy.load import build_model, holds_blocks
from mmdbb.mm.outputs import Contents, Source
from mmdbb.mm.stock.config import stock_config
from mmdbb.mm.stock.partial import (
    merge_some_,
    partial_config,
    select_blocks,
    whole_config,
)
from mmdbb.mm.structure import Structure, written_structure
from mmdbb.reparam import find_blocks
from mmdbb.stock_weights import names_in, stock_state


class MergeOptions(NamedTuple):
    """How blocks are merged, and which.

    Attributes:
        fuse: Whether to fold the norms into the convolutions too.
        only: Patterns for the names of the blocks to merge; by default all.
        skip: Patterns for the names of blocks to leave as they are.
        dtype: What kernels and norms are composed in, ``torch.float64`` or
            ``torch.float32``.
    """

    fuse: bool = False
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    dtype: torch.dtype = torch.float64


class Merged(NamedTuple):
    """What :func:`merge_checkpoint` made of a checkpoint.

    Attributes:
        trained: The network with blocks, in eval mode.
        network: The network to deploy, in eval mode, before it is rounded.
        contents: What to write of it: the config, the weights before they are
            rounded, and what is noted beside them.
        merged: Names of the blocks merged now.
        left: How many blocks are left as they are.
    """

    trained: nn.Module
    network: nn.Module
    contents: Contents
    merged: List[str]
    left: int


def merge_checkpoint(
    source: Source, options: Optional[MergeOptions] = None
) -> Merged:
    """Merge the network of a checkpoint, in memory.

    Args:
        source: The trained checkpoint and its config.
        options: How to merge; by default everything, and norms stay.

    Raises:
        UserError: If an input is wrong.
    """
    cfg, checkpoint = source.cfg, source.checkpoint
    options = options or MergeOptions()
    loaded = source.read()
    state, meta = loaded['state_dict'], loaded['meta']
    taken = loaded['weights']
    del loaded  # with the optimizer's state
    structure = written_structure(dict(meta=meta))
    if structure in (Structure.STOCK, Structure.FUSED):
        raise UserError(
            f'{checkpoint} is merged already (structure: {structure.value})'
        )
    trained = trained_network(cfg, state, checkpoint)
    del state
    own_dtype = _own_dtypes(trained)
    trained = trained.to(options.dtype)
    blocks = find_blocks(trained)
    left = {n: b for n, b in blocks.items() if not b.deploy}
    merged = select_blocks(left, options.only, options.skip)
    partial = len(merged) < len(left)
    if partial and options.fuse:
        raise UserError(
            '--fuse folds norms into merged blocks; it does not go with '
            f'blocks that are left: {some(sorted(left.keys() - merged))}'
        )
    make = _partly_merged if partial else _stock
    try:
        network, new_cfg = make(cfg, trained, merged, options.dtype)
    except ValueError as error:
        raise UserError(f'{checkpoint}: {error}') from error
    structure = Structure.PARTIAL if partial else Structure.STOCK
    if options.fuse:
        network = fuse_conv_bn(network)
        structure = Structure.FUSED
    renamed = names_in(network, trained)
    own_dtypes = {renamed(name): own for name, own in own_dtype.items()}
    dtypes = {
        name: _dtype_of(name, own_dtypes)
        if value.is_floating_point()
        else value.dtype
        for name, value in network.state_dict().items()
    }
    _refuse_overflow(network, dtypes, checkpoint)
    contents = Contents(
        cfg=new_cfg,
        state=network.state_dict(),
        structure=structure,
        weights=taken,
        dtypes=dtypes,
        meta=meta,
        notes=dict(merged=list(new_cfg.model.merged)) if partial else {},
    )
    return Merged(
        trained=trained,
        network=network,
        contents=contents,
        merged=merged,
        left=len(left) - len(merged),
    )


def trained_network(
    cfg: Config, state: Dict[str, Tensor], checkpoint: str
) -> nn.Module:
    """The network of a config with the weights of a training.

    Args:
        cfg: Of the training.
        state: Its weights, which the network then has as they are.
        checkpoint: Where they come from, for messages.

    Raises:
        UserError: If there is nothing to merge, or they do not fit.
    """
    trained = build_model(cfg)
    if not find_blocks(trained):
        raise UserError(
            'the network of the config has no block to merge: no conv_cfg '
            'and no backbone of mmdbb'
        )
    _refuse_merged(trained, state, checkpoint)
    load_strictly(trained, state, checkpoint, keep_dtype=True)
    return trained


def _refuse_overflow(
    network: nn.Module, dtypes: Dict[str, torch.dtype], checkpoint: str
) -> None:
    """Raise if a number is too large for the precision that it will have."""
    for name, value in network.state_dict().items():
        if not value.to(dtypes[name]).isfinite().all():
            layer, _, entry = name.rpartition('.')
            precision = str(dtypes[name]).rpartition('.')[2]
            raise UserError(
                f'{checkpoint}: cannot merge {layer}: its {entry} is not '
                f'finite in {precision}'
            )


def _own_dtypes(trained: nn.Module) -> Dict[str, torch.dtype]:
    """The precisions of a network, by its entries and, for blocks, layers.

    A block's convolution has the precision of the block. So has a norm that
    comes back behind it.
    """
    norms = norm_names(trained)
    found = {}
    for name, block in find_blocks(trained).items():
        found[norms.get(name)] = leaf_dtype(block)
    for name, value in trained.state_dict().items():
        if value.is_floating_point():
            found[name] = value.dtype
    for name, block in find_blocks(trained).items():
        for layer in (name, f'{name}.reparam_conv' if name else name):
            found[layer] = leaf_dtype(block)
            for entry in ('weight', 'bias'):
                found[f'{layer}.{entry}'] = found[layer]
    found.pop(None, None)
    return found


def _dtype_of(name: str, own: Dict[str, torch.dtype]) -> torch.dtype:
    layer = name.rpartition('.')[0]
    # The bias of a norm that was folded is as its convolution's kernel.
    for known in (name, layer, f'{layer}.weight'):
        if known in own:
            return own[known]
    raise AssertionError(f'{name} comes from nowhere')


def _refuse_merged(model: nn.Module, state: Dict, path: str) -> None:
    blocks = find_blocks(model)
    left = [name for name, block in blocks.items() if not block.deploy]
    if not holds_blocks(state, model):
        raise UserError(
            f'{path} is merged already, or is of a plain network: none of '
            f'its entries is of a branch, where {some(left or [*blocks])} '
            'should have some'
        )


def _stock(
    cfg: Config, trained: nn.Module, merged: List[str], dtype: torch.dtype
) -> Tuple[nn.Module, Config]:
    stock_cfg = stock_config(whole_config(cfg))
    stock = build_model(stock_cfg)
    state = stock_state(trained, stock, dtype=dtype)
    load_strictly(stock, state, 'the merged network', keep_dtype=True)
    return stock, stock_cfg


def _partly_merged(
    cfg: Config, trained: nn.Module, merged: List[str], dtype: torch.dtype
) -> Tuple[nn.Module, Config]:
    blocks = find_blocks(trained)
    before = [name for name, block in blocks.items() if block.deploy]
    state = trained.state_dict()
    for name in merged:
        inside = f'{name}.'
        state = {k: v for k, v in state.items() if not k.startswith(inside)}
    for name in merged:
        conv = _converted(name, blocks[name], dtype)
        for entry, value in conv.state_dict().items():
            state[f'{name}.reparam_conv.{entry}'] = value
    new_cfg = partial_config(cfg, [*before, *merged])
    network = build_model(cfg)
    merge_some_(network, merged)
    load_strictly(network, state, 'the merged network', keep_dtype=True)
    return network, new_cfg


def _converted(
    name: str, block: ReparamConv2d, dtype: torch.dtype
) -> nn.Conv2d:
    try:
        return block.to_conv(dtype)
    except ValueError as error:
        raise ValueError(f'cannot merge {name}: {error}') from error
