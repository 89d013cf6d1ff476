# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The parts of a network for which its config asks for blocks.

A class of an OpenMMLab package may take ``conv_cfg`` and build no layer of it.
Then the part trains as a plain one, and nothing else tells.
"""

from __future__ import annotations

import math
from typing import (
    Any,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from mmengine.config import Config
from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.dimensions import CONVS
from mmdbb.errors import UserError
from mmdbb.files.sources import some
from mmdbb.mm.config_types import class_of
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.stock.by_name import build_with_blocks
from mmdbb.mm.stock.config import UPSAMPLE_KEY, named_block, stock_config
from mmdbb.mm.stock.partial import whole_config
from mmdbb.reparam import find_blocks


class Asked(NamedTuple):
    """A dict in a config that asks for blocks.

    Attributes:
        place: Its dotted key in the model's config, such as
            ``'roi_head.mask_head'``; empty for the model itself.
        kind: The class or function that its ``type`` names; None if unknown.
        key: The key that asks: ``conv_cfg``, ``upsample_cfg``, ``block`` of a
            ready backbone, or ``blocks`` of a model of type ``WithBlocks``.
        sizes: Smallest and largest kernel (longer side, in taps) that becomes
            a block.
    """

    place: str
    kind: Optional[Any]
    key: str
    sizes: Tuple[int, float]


class Part(NamedTuple):
    """A part of a network, and the blocks in it.

    Attributes:
        asked: The dict in the config that asks for them.
        name: Name of the part's class.
        blocks: Names of its blocks, without doubles.
        plain: Number of its convolutions that stay plain although their
            kernels are as large as a block's.
    """

    asked: Asked
    name: str
    blocks: List[str]
    plain: int

    @property
    def why_none(self) -> str:
        """Why the part has no block, as a clause."""
        place, key = self.asked.place or 'model', self.asked.key
        if self.plain:
            reason = f'{self.name} builds no layer of it'
        else:
            low, high = self.asked.sizes
            sizes = f'{low} to {high}' if math.isfinite(high) else f'{low} on'
            reason = f'{self.name} has no convolution of {sizes} taps'
        return f'{key} is set in {place}, but {reason}'


def parts_of(cfg: Config, model: nn.Module) -> List[Part]:
    """Find the parts for which a config asks for blocks.

    Args:
        cfg: The config, with ``custom_imports`` imported already.
        model: The network that it builds, not wrapped.

    Returns:
        list: The parts in the config's order. A dict whose module is not
        found in the network is left out.
    """
    names = {m: n for n, m in model.named_modules()}
    found = []
    for asked in _asked(cfg):
        modules = _modules_of(asked, model)
        if not modules:
            continue
        inside = [m for module in modules for m in module.modules()]
        blocks = [m for m in inside if isinstance(m, ReparamConv2d)]
        own = {m for block in blocks for m in block.modules()}
        low, high = asked.sizes
        plain = {
            m
            for m in inside
            if isinstance(m, CONVS)
            and m not in own
            and low <= max(m.kernel_size) <= high
        }
        kind = asked.kind
        if not isinstance(kind, type):
            kind = type(modules[0])
        listed = list(dict.fromkeys(names[block] for block in blocks))
        found.append(Part(asked, kind.__name__, listed, len(plain)))
    return found


def refuse_no_block(cfg: Config, model: nn.Module) -> None:
    """Raise if a config asks for blocks and its network has none.

    Args:
        cfg: The config. One that asks for no block is a plain baseline.
        model: The network that it builds, not wrapped.

    Raises:
        UserError: If there is none. The message says which part ignores what.
    """
    if any(isinstance(m, ReparamConv2d) for m in model.modules()):
        return
    asked, parts = list(_asked(cfg)), parts_of(cfg, model)
    if not asked:
        return
    reasons = [part.why_none for part in parts] or [
        f'{each.key} is set in {each.place or "model"}, but the network has '
        'no layer of it'
        for each in asked
    ]
    raise UserError(f'the network has no block: {"; ".join(reasons)}')


def stock_network(cfg: Config) -> Tuple[nn.Module, Config]:
    """Build the stock network of a config.

    Args:
        cfg: The config of the network with blocks; unchanged.

    Returns:
        tuple: The network in eval mode, with random weights, and its config.

    Raises:
        UserError: If it cannot be built, or has blocks after all: a class
            that builds blocks by itself builds them from any config.
    """
    stock_cfg = stock_config(whole_config(cfg))
    stock = build_model(stock_cfg)
    blocks = list(find_blocks(stock))
    if blocks:
        parent = stock.get_submodule(blocks[0].rpartition('.')[0])
        raise UserError(
            f'{type(parent).__name__} builds the blocks {some(blocks)} by '
            'itself, and no key of the config names them, so no config builds '
            'the network without them. Let the class take a conv_cfg, use a '
            'model of type WithBlocks, or merge in Python: '
            'mmdbb.reparameterize(model)'
        )
    return stock, stock_cfg


def why_no_stock(cfg: Config) -> Optional[str]:
    """Why no config builds the network without blocks; None if one does.

    Args:
        cfg: The config of the network with blocks; unchanged.
    """
    try:
        stock_network(cfg)
    except UserError as error:
        return str(error)
    except Exception as error:  # a host's own, which must stop no training
        kind = type(error).__name__
        return f'the stock network cannot be built: {kind}: {error}'
    return None


def _asked(cfg: Config) -> Iterator[Asked]:
    """The dicts in a model's config that ask for blocks."""
    fields = cfg.to_dict()
    yield from _asked_in(fields.get('model'), '', fields.get('default_scope'))


def _asked_in(node: Any, place: str, scope: Optional[str]) -> Iterator[Asked]:
    if isinstance(node, dict):
        scope = node.get('_scope_', scope)
        kind = class_of(node.get('type'), scope)
        for key, value in node.items():
            block = named_block(value, scope)
            keys = ('conv_cfg', UPSAMPLE_KEY)
            if block and (key == 'block' or key.endswith(keys)):
                yield Asked(place, kind, key, _sizes([value], scope))
        if kind is build_with_blocks and node.get('blocks'):
            yield Asked(place, kind, 'blocks', _sizes(node['blocks'], scope))
        if hasattr(kind, 'default_block') and not node.get('block'):
            block = named_block(kind.default_block, scope)
            yield Asked(place, kind, 'block', block.kernel_sizes)
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return
    for key, value in items:
        inner = f'{place}.{key}' if place else str(key)
        yield from _asked_in(value, inner, scope)


def _sizes(blocks: Sequence[dict], scope: Optional[str]) -> Tuple[int, float]:
    """Smallest and largest kernel that becomes one of these blocks."""
    sizes = []
    for cfg in blocks:
        block = named_block(cfg, scope)
        if block is not None:  # else it is for layers that stay plain
            low, high = block.kernel_sizes
            low = cfg.get('min_kernel_size', low)
            sizes.append((low, cfg.get('max_kernel_size', high)))
    lows, highs = zip(*(sizes or [(1, math.inf)]))
    return min(lows), max(highs)


def _modules_of(asked: Asked, model: nn.Module) -> List[nn.Module]:
    """The modules that a dict in the config has become.

    A wrapper may build a part under another name, or more than once (teacher
    and student), so the class tells where the name does not.
    """
    try:
        return [model.get_submodule(asked.place)]
    except AttributeError:
        pass
    found: List[nn.Module] = []
    inside: Set[nn.Module] = set()
    for module in model.modules():
        if type(module) is asked.kind and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found
