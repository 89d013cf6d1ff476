# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Networks whose blocks are chosen by the names of layers, in a config.

A convolution does not know its name while it is built, so ``conv_cfg`` cannot
choose by it. The model of type ``WithBlocks`` builds OpenMMLab's network and
then puts blocks into it. It returns that network itself without a wrapper, so
its entries keep their names, every runner and tool gets blocks before the
optimizer is built, and the other keys of the model's config stay where they
are.
"""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmdbb.by_name import put_blocks_
from mmdbb.drop_branches import drop_branches_
from mmdbb.errors import UserError
from mmdbb.mm.config_types import class_of
from mmdbb.mm.stock.config import imports_of
from mmdbb.mm.stock.partial import TYPE as PARTLY_MERGED
from mmdbb.mm.stock.partial import scoped

TYPE = 'WithBlocks'
#: Keys of its own.
KEYS = ('network', 'blocks', 'dropped')


@MODELS.register_module(name=TYPE)
def build_with_blocks(
    network: Any,
    blocks: Optional[Sequence[dict]] = None,
    dropped: Optional[Mapping[str, Sequence[str]]] = None,
    **arguments,
) -> nn.Module:
    """Build a network, and choose its blocks by the names of layers.

    Args:
        network: Type of the network.
        blocks: Configs of blocks, each with ``only`` and ``skip``, see
            :func:`mmdbb.by_name.put_blocks_`; None changes no layer.
        dropped: Names of blocks -> names of the branches that they do
            without; ``tools/branches.py`` writes it.
        arguments: The other keywords of the network's config.

    Returns:
        nn.Module: The network, not wrapped.

    Raises:
        KeyError: If no registry has the network.
        TypeError: If ``blocks`` has another form, or unknown keys.
        ValueError: If a name or a pattern does not fit the network.
    """
    model = MODELS.build(dict(arguments, type=_kind_of(network)))
    try:
        if blocks is not None:
            put_blocks_(model, list(blocks))
        if dropped:
            drop_branches_(model, dropped, fold=False)
    except UserError as error:
        raise ValueError(f'{TYPE}: {error}') from error
    return model


def _kind_of(network: Any) -> Any:
    """The network's class.

    By the default scope, where there is one: some names stand in several
    registries. If a package's own registry was asked, it is lost by now.
    """
    if not isinstance(network, str):
        return network
    with MODELS.switch_scope_and_registry(None) as registry:
        kind = registry.get(network)
    kind = kind or class_of(network)
    if kind is None:
        raise KeyError(
            f'network={network!r} of {TYPE} is in no registry; write the '
            "type that the model had, such as 'ImageClassifier' or "
            "'mmdet.FasterRCNN'"
        )
    return kind


def plain_cfg(cfg: dict) -> dict:
    """The config of the network without blocks; see ``stock_config``.

    Args:
        cfg: A config of this type; unchanged.
    """
    plain = {key: value for key, value in cfg.items() if key not in KEYS}
    plain['type'] = cfg['network']
    inner = class_of(cfg['network'])
    return inner.plain_cfg(plain) if hasattr(inner, 'plain_cfg') else plain


build_with_blocks.plain_cfg = plain_cfg


def without_branches(
    cfg: Config, dropped: Mapping[str, Sequence[str]]
) -> Config:
    """The config of a network whose blocks do without some branches.

    Args:
        cfg: Config of the network; unchanged.
        dropped: Names of blocks -> names of the branches to drop.

    Returns:
        Config: A copy, without a checkpoint to start from.
    """
    fields = cfg.to_dict()
    model = fields['model']
    scope = fields.get('default_scope')
    # Blocks are merged in the network that does without branches already.
    key = 'network_type' if model['type'] == PARTLY_MERGED else 'type'
    if class_of(model[key], scope) is not build_with_blocks:
        model.update({key: TYPE, 'network': scoped(model[key], scope)})
    before = {k: list(v) for k, v in (model.get('dropped') or {}).items()}
    for name, keys in dropped.items():
        before[name] = [*before.get(name, ()), *keys]
    model['dropped'] = before
    imports, names = imports_of(fields)
    if not any(name.split('.')[0] == 'mmdbb' for name in names):
        fields['custom_imports'] = dict(imports, imports=[*names, 'mmdbb'])
    fields.update(load_from=None, resume=False)
    return Config(fields)
