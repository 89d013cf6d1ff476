# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The distinct architectures among a package's configs.

Two configs have the same architecture if their model, backbone, neck, heads
and the like are of the same classes, and the norms and convolutions that the
config gives to each are of the same kinds. Depths, widths and numbers of
classes make no difference here; the config that looks smallest stands for all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from mmengine.config import Config

#: Matches keys whose values are parts of a network.
_PART = re.compile(
    r'(backbone|neck|head|encoder|decoder|detector|segmentor|architecture'
    r'|model|generator|student|teacher)s?$'
)
#: Keys of the layers that a part is built of.
_LAYERS = ('norm_cfg', 'conv_cfg', 'dcn')
#: Matches layers that make no other architecture, because most classes have
#: them by default.
_USUAL = re.compile(r'((naive|MM)?(Sync)?BN|Conv)([123]d)?$|None$')


class Architecture(NamedTuple):
    """A network, and the configs that are of it.

    Attributes:
        package: Import name of the package.
        parts: Where a part stands in the model's config -> its class, with
            the package that it belongs to. Unusual layers of a part, such as
            ``model.neck.norm_cfg``, count as parts too.
        config: The config that stands for all, from the package's folder of
            configs.
        path: Absolute path of that config.
        configs: How many configs are of this architecture.
    """

    package: str
    parts: Dict[str, str]
    config: str
    path: str
    configs: int

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return key_of(self.package, self.parts)


def key_of(package: str, parts: Dict[str, str]) -> str:
    """What tells an architecture from all others.

    Args:
        package: Import name of the package.
        parts: As in :class:`Architecture`.
    """
    return ' '.join([package, *(f'{k}={v}' for k, v in sorted(parts.items()))])


class Read(NamedTuple):
    """What is kept of a config that was read.

    Attributes:
        path: Absolute path of the config.
        parts: As in :class:`Architecture`; empty if it has no model.
        size: How large the network looks; the smallest stands for all.
        error: Why it cannot be read; empty if it can.
    """

    path: str
    parts: Dict[str, str]
    size: float
    error: str = ''


def read_config(path: Path, package: str) -> Read:
    """Read what matters here of a config.

    Args:
        path: Path of the config.
        package: Import name of the package that it belongs to.
    """
    try:
        model = Config.fromfile(path).to_dict().get('model')
    except Exception as error:  # a config is code, and may fail in any way
        return Read(str(path), {}, 0.0, f'{type(error).__name__}: {error}')
    if not isinstance(model, dict):
        return Read(str(path), {}, 0.0)
    return Read(
        str(path),
        {where: full_type(kind, package) for where, kind in parts_of(model)},
        _size_of(model),
    )


def distinct(package: str, read: List[Read]) -> List[Architecture]:
    """The distinct architectures, in the order of their configs' names.

    Args:
        package: Import name of the package.
        read: Its configs, from :func:`read_config`.
    """
    groups: Dict[str, List[Read]] = {}
    for one in read:
        if one.parts:
            groups.setdefault(key_of(package, one.parts), []).append(one)
    found = []
    for group in groups.values():
        first = min(group, key=lambda one: (one.size, len(one.path), one.path))
        name = first.path.partition('/configs/')[2]
        found.append(
            Architecture(package, first.parts, name, first.path, len(group))
        )
    return sorted(found, key=lambda each: each.config)


def parts_of(
    node: Any, where: str = 'model', is_part: bool = True
) -> Iterator[Tuple[str, Any]]:
    """All parts of a network, and their unusual layers: place and type.

    Args:
        node: The model's config, or a part of it.
        where: Where it stands.
        is_part: Whether the key under which it stands is that of a part.
    """
    if isinstance(node, (list, tuple)):
        for number, each in enumerate(node):
            yield from parts_of(each, f'{where}.{number}', is_part)
    elif isinstance(node, dict):
        if is_part and node.get('type') is not None:
            yield where, node['type']
            yield from _unusual_layers(node, where)
        for key, value in node.items():
            inner = bool(_PART.search(str(key)))
            yield from parts_of(value, f'{where}.{key}', inner)


def _unusual_layers(node: dict, where: str) -> Iterator[Tuple[str, str]]:
    for key in _LAYERS:
        layer = node.get(key)
        kind = layer.get('type') if isinstance(layer, dict) else None
        name = getattr(kind, '__name__', str(kind))
        if not _USUAL.match(name):
            # Of torch's or mmcv's, whatever the package.
            yield f'{where}.{key}', f'layer.{name}'


def full_type(kind: Any, package: Optional[str]) -> str:
    """A class's name with the package that it belongs to.

    Args:
        kind: What a config has under ``type``: a registered name with or
            without its package, a full path, or the class.
        package: The package that a name without one belongs to.
    """
    if not isinstance(kind, str):
        kind = f'{kind.__module__}.{kind.__qualname__}'
    first, dot, rest = kind.partition('.')
    return f'{first}.{rest.rpartition(".")[2]}' if dot else f'{package}.{kind}'


def _size_of(model: Any) -> float:
    """How large a network looks by its config: depths first, then widths."""
    depth, width = 0, 0
    for node in _dicts(model):
        for key, value in node.items():
            if key == 'depth' and isinstance(value, int):
                depth += value
            elif 'channels' in str(key) and isinstance(value, int):
                width += value
            elif key in _FACTORS and isinstance(value, (int, float)):
                width += 100 * value
            elif key in ('arch', 'type') and isinstance(value, str):
                width += len(value) + 100 * (value in _LARGE)
    return depth + width / 1e6


#: What YOLO's networks multiply their depths and widths by.
_FACTORS = ('deepen_factor', 'widen_factor')
#: Names of the larger networks of a kind.
_LARGE = ('m', 'l', 'x', 'xl', 'h', 'medium', 'large', 'huge')


def _dicts(node: Any) -> Iterator[dict]:
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for each in node:
            yield from _dicts(each)
