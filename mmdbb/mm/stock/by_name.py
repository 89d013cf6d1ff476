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

import inspect
import math
from typing import Any, Mapping, Optional, Sequence

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.equivalent import settable
from mmdbb.by_name import is_prior, put_blocks_
from mmdbb.drop_branches import drop_branches_
from mmdbb.errors import UserError
from mmdbb.mm.config_types import class_of
from mmdbb.mm.stock.config import imports_of
from mmdbb.mm.stock.partial import TYPE as PARTLY_MERGED
from mmdbb.mm.stock.partial import scoped
from mmdbb.plain.blocks import copy_entries_, plain_start
from mmdbb.reparam import find_blocks
from mmdbb.transforms import KernelBias

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
            if inspect.isfunction(getattr(type(model), 'init_weights', None)):
                model.init_weights = InitThenStart(model)
        if dropped:
            drop_branches_(model, dropped, fold=False)
    except UserError as error:
        raise ValueError(f'{TYPE}: {error}') from error
    return model


class InitThenStart:
    """A network's own ``init_weights``, which blocks listen to.

    Heads write priors into the biases of convolutions that they name. A block
    there starts as the convolution with that prior, as far as its norms let
    it; all other blocks start by their own rules.

    Args:
        model: The network whose ``init_weights`` this replaces. The two are
            copied and pickled together.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        blocks = find_blocks(self.model)
        names = {block: name for name, block in blocks.items()}
        present = [b for b in names if not b.deploy]
        with settable(present) as written:
            result = type(self.model).init_weights(self.model, *args, **kwargs)
        for block, values in written.items():
            try:
                _start_as_written_(block, **values)
            except ValueError as error:
                raise ValueError(
                    f'{names[block]}: {type(self.model).__name__} writes '
                    f'a start into it, which a {type(block).__name__} cannot '
                    f'take: {error}. Leave it plain: skip={names[block]!r}'
                ) from error
        return result


def _start_as_written_(
    block: ReparamConv2d, weight: Tensor, bias: Optional[Tensor]
) -> None:
    if block.own_bias is not None:  # a parameter, which is written itself
        bias = block.own_bias.detach()
    is_zero = not weight.any()
    if is_zero and isinstance(block, BranchSumConv2d):
        raise ValueError('its norms make it start as more than zero')
    prior = bias is not None and not bias.isnan().any() and is_prior(bias)
    if not (is_zero or prior):
        return
    if bias is None or bias.isnan().any():
        bias = weight.new_zeros(block.out_channels)
    if weight.isnan().any():  # torch's own start
        nn.init.kaiming_uniform_(weight, math.sqrt(5))
    copy_entries_(block, plain_start(block, KernelBias(weight, bias)))


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
