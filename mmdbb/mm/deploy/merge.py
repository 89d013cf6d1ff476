# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merge the network of a trained checkpoint, in memory."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.branches.base import leaf_dtype
from mmdbb.dimensions import CONVS
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import load_strictly
from mmdbb.files.sources import some, with_versions_of
from mmdbb.found_norms import absorbed_norms
from mmdbb.mm.data_flow import norms_of
from mmdbb.mm.deploy.fused import fold_norms_, give_biases_
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.deploy.parts import refuse_no_block, stock_network
from mmdbb.mm.outputs import Contents, Source
from mmdbb.mm.stock.config import deployed_config
from mmdbb.mm.stock.partial import (
    merge_some_,
    partial_config,
    select_blocks,
)
from mmdbb.mm.structure import Structure, written_structure
from mmdbb.modules import is_norm, names_of
from mmdbb.own_blocks import has_own_blocks, merge_own_blocks
from mmdbb.reparam import find_blocks, holds_blocks
from mmdbb.stock_weights import names_in, stock_state
from mmdbb.untouched import Pairs


class MergeOptions(NamedTuple):
    """Which blocks to merge, and how.

    Attributes:
        fuse: Whether to fold the norms into the convolutions too.
        only: Shell patterns of the names of the blocks to merge; by default
            all are merged.
        skip: Shell patterns of the names of blocks not to merge.
        dtype: Precision in which kernels and norms are composed,
            ``torch.float64`` or ``torch.float32``.
        also_own: Whether to merge blocks of other packages too, such as
            mmpretrain's RepVGG, by their own methods; by default only if the
            network has no blocks of mmdbb.
    """

    fuse: bool = False
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    dtype: torch.dtype = torch.float64
    also_own: Optional[bool] = None


class Merged(NamedTuple):
    """A trained network and its merged form, from :func:`merge_checkpoint`.

    Attributes:
        trained: The network with blocks, in eval mode.
        network: The merged network, in eval mode, with weights that are not
            rounded yet.
        contents: The config, the weights (not rounded yet) and the notes to
            write into the files.
        merged: Names of the blocks that this call merged, one of each.
        left: Number of blocks that were not merged.
        own: Names of blocks of other packages that were merged too.
        own_left: Whether such blocks are left.
        norms: Name of a block in ``trained`` -> names of the norms behind it
            that may hold its bias.
    """

    trained: nn.Module
    network: nn.Module
    contents: Contents
    merged: List[str]
    left: int
    own: List[str]
    own_left: bool
    norms: Pairs


def merge_checkpoint(
    source: Source, options: Optional[MergeOptions] = None
) -> Merged:
    """Merge the network of a checkpoint, in memory.

    Args:
        source: The trained checkpoint and its config.
        options: Which blocks to merge, and how; by default all are merged,
            and norms stay.

    Raises:
        UserError: If an input is wrong, or cannot be merged.
    """
    cfg, checkpoint = source.config, source.checkpoint
    options = options or MergeOptions()
    loaded = source.read()
    state, meta = loaded['state_dict'], loaded['meta']
    taken = loaded['weights']
    del loaded  # it also holds the optimizer's state, which is large
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
    merged = left and select_blocks(left, options.only, options.skip)
    also_own = options.also_own
    if also_own is None:
        also_own = not blocks
    # A block that stands in several places is merged in all of them, once.
    first = {block: name for name, block in reversed(left.items())}
    merged = list(dict.fromkeys(first[left[name]] for name in merged))
    partial = len(merged) < len(first)
    if partial and options.fuse:
        raise UserError(
            '--fuse folds norms into merged blocks; it does not go with '
            'blocks that are left: '
            f'{some(sorted({*first.values()} - {*merged}))}'
        )
    make = _partly_merged if partial else _stock
    own: List[str] = []
    if options.fuse and not also_own:
        make = _fused
    try:
        network, new_cfg, norms = make(cfg, trained, merged, options.dtype)
        if also_own:
            network, new_cfg, own = _own_merged(network, new_cfg)
            if options.fuse:
                fold_norms_(network, norms_of(network).pairs)
    except ValueError as error:
        raise UserError(f'{checkpoint}: {error}') from error
    structure = Structure.PARTIAL if partial else Structure.STOCK
    if options.fuse:
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
        left=len(first) - len(merged),
        own=own,
        own_left=not also_own and has_own_blocks(network),
        norms=norms,
    )


def trained_network(
    cfg: Config, state: Dict[str, Tensor], checkpoint: str
) -> nn.Module:
    """Build the network of a config, and load trained weights into it.

    Args:
        cfg: The config that the network was trained with.
        state: The weights. The network takes the tensors over, with their
            precision.
        checkpoint: Path of the file with the weights, for messages.

    Raises:
        UserError: If the network has no block to merge, the weights are
            merged already, or they do not fit the network.
    """
    trained = build_model(cfg)
    if not find_blocks(trained) and not has_own_blocks(trained):
        refuse_no_block(cfg, trained)
        raise UserError(
            'the network of the config has no block to merge: no conv_cfg '
            'and no backbone of mmdbb'
        )
    if find_blocks(trained):
        _refuse_merged(trained, state, checkpoint)
    load_strictly(trained, state, checkpoint, keep_dtype=True)
    return trained


def _refuse_overflow(
    network: nn.Module, dtypes: Dict[str, torch.dtype], checkpoint: str
) -> None:
    """Raise if a number is too large for the precision it is rounded to."""
    for name, value in network.state_dict().items():
        if not value.to(dtypes[name]).isfinite().all():
            layer, _, entry = name.rpartition('.')
            precision = str(dtypes[name]).rpartition('.')[2]
            raise UserError(
                f'{checkpoint}: cannot merge {layer}: its {entry} is not '
                f'finite in {precision}'
            )


def _own_dtypes(trained: nn.Module) -> Dict[str, torch.dtype]:
    """The precision of each entry and, for blocks, of each merged layer.

    A block's merged convolution has the precision of the block, and so has
    the norm after it if that comes back.
    """
    norms, names = absorbed_norms(trained), names_of(trained)
    found = {}
    for name, block in find_blocks(trained).items():
        if name in norms:
            place = trained.get_submodule(norms[name])
            found.update(dict.fromkeys(names[place], leaf_dtype(block)))
    for name, value in trained.state_dict().items():
        if value.is_floating_point():
            found[name] = value.dtype
    for name, block in find_blocks(trained).items():
        for layer in (name, f'{name}.reparam_conv' if name else name):
            found[layer] = leaf_dtype(block)
            for entry in ('weight', 'bias'):
                found[f'{layer}.{entry}'] = found[layer]
    return found


def _dtype_of(name: str, own: Dict[str, torch.dtype]) -> torch.dtype:
    layer = name.rpartition('.')[0]
    # Folding a norm gives the convolution a bias, which the trained network
    # did not have; it gets the precision of the kernel.
    for known in (name, layer, f'{layer}.weight'):
        if known in own:
            return own[known]
    # A block of another package has new names once it is merged.
    while layer:
        inside = [n for n in own if n.startswith(f'{layer}.')]
        if inside:
            return own[inside[0]]
        layer = layer.rpartition('.')[0]
    raise AssertionError(f'{name} comes from nowhere')


def _refuse_merged(model: nn.Module, state: Dict, path: str) -> None:
    blocks = find_blocks(model)
    left = [name for name, block in blocks.items() if not block.deploy]
    if not holds_blocks(state, model):
        raise UserError(
            f'{path} is merged already, or is of a plain network: none of '
            "its entries is a branch's, but the config has blocks at "
            f'{some(left or [*blocks])}'
        )


def _stock(
    cfg: Config, trained: nn.Module, merged: List[str], dtype: torch.dtype
) -> Tuple[nn.Module, Config, Pairs]:
    stock, stock_cfg = stock_network(cfg)
    norms = norms_of(stock)
    state = trained.state_dict()
    if find_blocks(trained):
        state = stock_state(trained, stock, norms=norms, dtype=dtype)
    load_strictly(stock, state, 'the merged network', keep_dtype=True)
    return stock, stock_cfg, _in_names_of(trained, stock, norms.pairs)


def _in_names_of(trained: nn.Module, stock: nn.Module, pairs: Pairs) -> Pairs:
    """Translate pairs of the stock network for the one that was trained."""
    renamed = names_in(stock, trained)
    # The name of a container may be that of a layer in the other network.
    layers = (ReparamConv2d, *CONVS, nn.Identity)
    own = {
        renamed(name): name
        for module, names in names_of(trained).items()
        if isinstance(module, layers) or is_norm(module)
        for name in names
    }
    return {
        own[conv]: tuple(own[norm] for norm in norms if norm in own)
        for conv, norms in pairs.items()
        if conv in own
    }


def _fused(
    cfg: Config, trained: nn.Module, merged: List[str], dtype: torch.dtype
) -> Tuple[nn.Module, Config, Pairs]:
    network, stock_cfg = stock_network(cfg)
    norms = norms_of(network)
    give_biases_(network, trained)
    state = stock_state(trained, network, norms=norms, dtype=dtype)
    load_strictly(network, state, 'the merged network', keep_dtype=True)
    pairs = _in_names_of(trained, network, norms.pairs)
    fold_norms_(network, norms.pairs)
    return network, stock_cfg, pairs


def _own_merged(
    network: nn.Module, cfg: Config
) -> Tuple[nn.Module, Config, List[str]]:
    """Merge blocks of other packages by their own methods.

    Args:
        network: The network of ``cfg``, without blocks of mmdbb to merge.
        cfg: Its config.

    Returns:
        tuple: The merged network, its config, and the names of the blocks.

    Raises:
        ValueError: If the network has no such block, or one is merged wrongly.
        UserError: If no config builds the merged network.
    """
    merged, blocks, _ = merge_own_blocks(network)
    if not blocks:
        raise ValueError(
            'the network has no re-parameterizable blocks of its own kind'
        )
    new_cfg = deployed_config(cfg)
    built = build_model(new_cfg)
    if built.state_dict().keys() != merged.state_dict().keys():
        raise UserError(
            f'{type(network).__name__} merges {some(blocks)}, but no argument '
            'in its config (deploy=True) builds the merged network; merge it '
            'in Python by mmdbb.reparameterize'
        )
    load_strictly(
        built, merged.state_dict(), 'the merged network', keep_dtype=True
    )
    return built, new_cfg, blocks


def _partly_merged(
    cfg: Config, trained: nn.Module, merged: List[str], dtype: torch.dtype
) -> Tuple[nn.Module, Config, Pairs]:
    blocks, names = find_blocks(trained), names_of(trained)
    before = [name for name, block in blocks.items() if block.deploy]
    state = trained.state_dict()
    for first in merged:
        conv = _converted(first, blocks[first], dtype)
        for name in names[blocks[first]]:
            for entry in [n for n in state if n.startswith(f'{name}.')]:
                del state[entry]
            for entry, value in conv.state_dict().items():
                state[f'{name}.reparam_conv.{entry}'] = value
    new_cfg = partial_config(cfg, [*before, *merged])
    network = build_model(cfg)
    merge_some_(network, merged)
    state = with_versions_of(network.state_dict(), state)
    load_strictly(network, state, 'the merged network', keep_dtype=True)
    # A block that stays a block keeps its bias; no norm behind it changes.
    return network, new_cfg, {}


def _converted(
    name: str, block: ReparamConv2d, dtype: torch.dtype
) -> nn.Module:
    try:
        return block.to_conv(dtype)
    except ValueError as error:
        raise ValueError(f'cannot merge {name}: {error}') from error
