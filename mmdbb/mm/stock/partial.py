# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Networks of which only some blocks are merged, built from a config.

OpenMMLab's packages have no such network. Its config has the type
``PartlyMerged`` of mmdbb, which builds the trained network and then merges
the listed blocks. It returns that network itself without a wrapper, so its
entries keep their names, and all tools of OpenMMLab's packages can build and
load it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Dict, List, Optional, Sequence

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
        network_type: Type of the network in the registry.
        merged: Names of the blocks to merge.
        arguments: The other keywords of the network's config.

    Returns:
        nn.Module: The network, not wrapped.

    Raises:
        ValueError: If ``merged`` has a name that no block has.

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
    """Merge some blocks in place.

    A merged block is still a block, which holds one convolution.

    Args:
        model: A network with blocks.
        names: Names of the blocks to merge.

    Raises:
        ValueError: If no block has one of the names.
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
        merged: Names of all blocks that are merged in it.

    Returns:
        Config: A copy, without a checkpoint to start from.
    """
    fields = without_own_starts(whole_config(cfg).to_dict())
    model = fields['model']
    scope = fields.get('default_scope')
    network_type = scoped(model['type'], scope)
    model.update(
        type=TYPE, network_type=network_type, merged=sorted(set(merged))
    )
    imports, names = imports_of(fields)
    if not any(name.split('.')[0] == 'mmdbb' for name in names):
        fields['custom_imports'] = dict(imports, imports=[*names, 'mmdbb'])
    fields.update(load_from=None, resume=False)
    return Config(fields)


def scoped(type_: object, scope: Optional[str]) -> object:
    """A type that no default scope is needed for.

    If an OpenMMLab package's own registry is asked to build a network of
    mmdbb's, no default scope is left when that looks up the network in it.

    Args:
        type_: The type in a config.
        scope: The config's default scope.
    """
    if not isinstance(type_, str) or '.' in type_ or not scope:
        return type_
    # What all packages share has no scope.
    return type_ if type_ in MODELS.module_dict else f'{scope}.{type_}'


def whole_config(cfg: Config) -> Config:
    """Undo :func:`partial_config`: the config with none of the blocks merged.

    Args:
        cfg: A config; one that ``partial_config`` did not make is returned.
    """
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
        blocks: Names -> blocks.
        only: Shell patterns (``*``, ``?``, ``[...]``), each of which must
            match a whole name; by default all blocks are chosen.
        skip: Shell patterns of blocks to leave out of those.

    Raises:
        UserError: If a pattern fits no block, or no block is left to merge.
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
