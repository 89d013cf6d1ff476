# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Networks of which only some blocks are merged, from a config.

The stock packages have no such network. Its config names it by a type of
mmdbb's, which builds the network that was trained and then merges the blocks
listed. What comes out is that network itself, under its own names, so that
every tool of the host packages builds and loads it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Dict, List, Sequence

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.errors import UserError
from mmdbb.files.sources import some
from mmdbb.mm.stock.config import imports_of, without_own_starts
from mmdbb.reparam import find_blocks

TYPE = 'PartlyMerged'


@MODELS.register_module(name=TYPE)
def build_partly_merged(
    network_type: str, merged: Sequence[str], **arguments
) -> nn.Module:
    """Build a network and merge some of its blocks in place.

    Args:
        network_type: The network's type.
        merged: Names of the blocks to merge.
        arguments: The network's other arguments.

    Returns:
        nn.Module: The network, not wrapped.

    Raises:
        ValueError: If a name is of no block.

    Examples:
        >>> model = MODELS.build(dict(
        ...     type='PartlyMerged', network_type='DBB', merged=[''],
        ...     in_channels=3, out_channels=8, kernel_size=3))
        >>> model.deploy
        True
    """
    model = MODELS.build(dict(arguments, type=network_type))
    merge_some_(model, merged)
    return model


def merge_some_(model: nn.Module, names: Sequence[str]) -> None:
    """Merge some blocks in place; each stays a block, of one convolution.

    Args:
        model: A network with blocks.
        names: Names of blocks.

    Raises:
        ValueError: If a name is of no block.
    """
    blocks = find_blocks(model)
    unknown = [name for name in names if name not in blocks]
    if unknown:
        raise ValueError(
            f'no such blocks: {some(unknown)}; the network has '
            f'{some(list(blocks)) or "none"}'
        )
    for name in names:
        blocks[name].switch_to_deploy()


def partial_config(cfg: Config, merged: Sequence[str]) -> Config:
    """The config of a network of which some blocks are merged.

    Args:
        cfg: Config of the network.
        merged: Names of the blocks.

    Returns:
        Config: A copy, without a checkpoint to start from.
    """
    fields = without_own_starts(whole_config(cfg).to_dict())
    model = fields['model']
    scope = fields.get('default_scope')
    network_type = model['type']
    # Inside of a builder there is no default scope where a host's own
    # registry was asked.
    if isinstance(network_type, str) and '.' not in network_type and scope:
        network_type = f'{scope}.{network_type}'
    model.update(
        type=TYPE, network_type=network_type, merged=sorted(set(merged))
    )
    imports, names = imports_of(fields)
    if not any(name.split('.')[0] == 'mmdbb' for name in names):
        fields['custom_imports'] = dict(imports, imports=[*names, 'mmdbb'])
    fields.update(load_from=None, resume=False)
    return Config(fields)


def whole_config(cfg: Config) -> Config:
    """The config of the same network with none of its blocks merged."""
    if (cfg.get('model') or {}).get('type') != TYPE:
        return cfg
    fields = cfg.to_dict()
    model = dict(fields['model'])
    model['type'] = model.pop('network_type')
    model.pop('merged', None)
    return Config(dict(fields, model=model), filename=cfg.filename)


def select_blocks(
    blocks: Dict[str, ReparamConv2d],
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> List[str]:
    """Names of the blocks that patterns choose.

    Args:
        blocks: Blocks by name.
        only: Patterns as of a shell (``*``, ``?``, ``[...]``) for whole
            names; by default all blocks are chosen.
        skip: Patterns for those to leave out again.

    Raises:
        UserError: If a pattern fits no block, or none is left.
    """
    for option, patterns in (('--only', only), ('--skip', skip)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in blocks):
                raise UserError(
                    f'{option} {pattern} fits no block; the blocks are '
                    f'{some(list(blocks), 5)}'
                )
    chosen = [
        name
        for name in blocks
        if (not only or any(fnmatchcase(name, p) for p in only))
        and not any(fnmatchcase(name, p) for p in skip)
    ]
    if not chosen:
        raise UserError(
            '--only and --skip leave no block to merge, of '
            f'{some(list(blocks), 5)}'
        )
    return chosen
