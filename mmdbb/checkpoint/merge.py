# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to the merged network, in memory."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.checkpoint.files import load_strictly, read_checkpoint, sha256, some
from mmdbb.checkpoint.load import (
    build_model,
    holds_blocks,
    written_structure,
)
from mmdbb.checkpoint.partial import (
    merge_some_,
    partial_config,
    select_blocks,
    whole_config,
)
from mmdbb.checkpoint.stock import stock_config
from mmdbb.checkpoint.stock_weights import stock_state
from mmdbb.checkpoint.verify import TOLERANCE, TOLERANCES
from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks
from mmdbb.version import __version__


class Merged(NamedTuple):
    """What :func:`merge_checkpoint` made of a checkpoint.

    Attributes:
        trained: The network with blocks, in eval mode.
        network: The network to deploy, in eval mode, its weights in the
            checkpoint's precision.
        cfg: Its config.
        meta: The notes to write beside its weights.
        structure: ``stock``; ``fused`` if norms are folded too; ``partial``
            if blocks are left.
        merged: Names of the blocks merged now.
        left: How many blocks are left as they are.
        weights: Which weights were taken from the checkpoint.
    """

    trained: nn.Module
    network: nn.Module
    cfg: Config
    meta: dict
    structure: str
    merged: List[str]
    left: int
    weights: str

    @property
    def tolerance(self) -> float:
        """The difference to allow, by the precision of the weights."""
        return max(
            TOLERANCES.get(p.dtype, TOLERANCE)
            for p in self.network.parameters()
        )


def merge_checkpoint(
    cfg: Config,
    checkpoint: str,
    fuse: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    ema: Optional[bool] = None,
    unsafe: bool = False,
) -> Merged:
    """Merge the network of a checkpoint, in memory.

    Args:
        cfg: Config that the checkpoint was trained with.
        checkpoint: Path of the trained checkpoint.
        fuse: Whether to fold the norms into the convolutions too.
        only: Patterns for the names of the blocks to merge; by default all.
        skip: Patterns for the names of blocks to leave as they are.
        dtype: What kernels and norms are composed in, ``torch.float64`` or
            ``torch.float32``; the result has the checkpoint's precision.
        ema: True for the averaged weights, False for those that training
            went on with; None for the averaged ones if there are any.
        unsafe: Whether to run what code the checkpoint holds.

    Raises:
        UserError: If an input is wrong.
    """
    loaded = read_checkpoint(checkpoint, ema, unsafe)
    state, meta = loaded['state_dict'], loaded['meta']
    taken = loaded['weights']
    del loaded  # with the optimizer's state
    structure = written_structure(dict(meta=meta))
    if structure in ('stock', 'fused'):
        raise UserError(
            f'{checkpoint} is merged already (structure: {structure})'
        )
    trained = build_model(cfg)
    blocks = find_blocks(trained)
    if not blocks:
        raise UserError(
            'the network of the config has no block to merge: no conv_cfg '
            'and no backbone of mmdbb'
        )
    _refuse_merged(trained, state, checkpoint)
    load_strictly(trained, state, checkpoint, keep_dtype=True)

    left = {n: b for n, b in blocks.items() if not b.deploy}
    merged = select_blocks(left, only, skip)
    partial = len(merged) < len(left)
    if partial and fuse:
        raise UserError(
            '--fuse folds norms into merged blocks; it does not go with '
            f'blocks that are left: {some(sorted(left.keys() - merged))}'
        )
    make = _partly_merged if partial else _stock
    try:
        network, new_cfg = make(cfg, trained, merged, dtype)
    except ValueError as error:
        raise UserError(f'{checkpoint}: {error}') from error
    if fuse:
        network = _fused(network, dtype)
    structure = 'partial' if partial else 'fused' if fuse else 'stock'
    own = dict(
        version=__version__,
        structure=structure,
        weights=taken,
        source_sha256=sha256(checkpoint),
    )
    if partial:
        own['merged'] = list(new_cfg.model.merged)
    kept = {k: v for k, v in meta.items() if k != 'cfg'}
    meta = dict(kept, cfg=new_cfg.pretty_text, mmdbb=own)
    return Merged(
        trained,
        network,
        new_cfg,
        meta,
        structure,
        merged,
        len(left) - len(merged),
        taken,
    )


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


def _fused(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Fold the norms in one precision, keep the weights in their own."""
    dtypes = {k: v.dtype for k, v in network.state_dict().items()}
    network = fuse_conv_bn(network.to(dtype))
    for name, module in network.named_modules():
        # The bias may be new; it is as its convolution's kernel was.
        kernel = dtypes.get(f'{name}.weight')
        for entry, value in [
            *module._parameters.items(),
            *module._buffers.items(),
        ]:
            if value is not None and value.is_floating_point():
                own = dtypes.get(f'{name}.{entry}', kernel)
                value.data = value.data.to(own)
    return network
