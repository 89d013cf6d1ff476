# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The types in a config: which class each one names, and back again.

A config names a class by the class itself, by a registered name with or
without the scope of its package (``mmdet.ResNet``), or by its module
(``mmdet.models.backbones.resnet.ResNet``). What a registry does not know and
Python cannot import is nobody's class, which is no error here: a config has
types that none of these registries holds.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator, Optional, Tuple

from mmengine.registry import MODELS, Registry
from mmengine.utils import get_object_from_string

#: From a dict of a config and the scope that it stands in to a dict.
Change = Callable[[dict, Optional[str]], dict]


def class_of(
    type_: Any, scope: Optional[str] = None, registry: Registry = MODELS
) -> Optional[Any]:
    """The class, or the function, that a type in a config names.

    Args:
        type_: What stands under ``type``.
        scope: The package whose registry is asked for a bare name; if None,
            or if it has no registry, all of them are asked.
        registry: Any one of the registries to ask: those of the OpenMMLab
            packages for the same things belong together.

    Returns:
        The class or the function; None if there is none.

    Examples:
        >>> class_of('mmengine.BaseDataPreprocessor').__name__
        'BaseDataPreprocessor'
        >>> class_of('NobodysNetwork') is None
        True
    """
    if not isinstance(type_, str):
        return type_
    found = registered(type_, scope, registry)
    if found is not None or '.' not in type_:
        return found
    try:
        return get_object_from_string(type_)
    except Exception:  # a user's module may raise anything, as for mmengine
        return None


def registered(
    name: str, scope: Optional[str] = None, registry: Registry = MODELS
) -> Optional[Any]:
    """As :func:`class_of`, for names; imports nothing."""
    registries = {r.scope: r for r in _tree(registry.root)}
    first, _, rest = name.partition('.')
    if rest:
        return _lookup(registries.get(first), rest)
    if scope in registries:
        return _lookup(registries[scope], name)
    known = (r.module_dict.get(name) for r in registries.values())
    return next((found for found in known if found is not None), None)


def type_of(kind: Any, registry: Registry = MODELS) -> Optional[str]:
    """The type by which a config of any scope names a class.

    Args:
        kind: A class, or a function.
        registry: Any one of the registries to look in.

    Returns:
        str: Such as ``mmdet.ResNet``, or a bare name in the registry that
        all packages share; None if it is not registered.

    Examples:
        >>> type_of(class_of('BaseDataPreprocessor'))
        'BaseDataPreprocessor'
    """
    package = module_of(kind).partition('.')[0]
    found = [
        (r.scope != package, r.scope, name)
        for r in _tree(registry.root)
        for name, known in r.module_dict.items()
        if known is kind
    ]
    if not found:
        return None
    _, scope, name = min(found)
    return name if scope == registry.root.scope else f'{scope}.{name}'


def module_of(kind: Any) -> str:
    """The module in which a class or a function is defined."""
    return getattr(kind, '__module__', None) or ''


def is_own(kind: Any) -> bool:
    """Whether a class or a function is defined in mmdbb."""
    return is_within(module_of(kind), 'mmdbb')


def is_within(module: str, package: str) -> bool:
    """Whether a module is a package, or is in it."""
    return f'{module}.'.startswith(f'{package}.')


def rewrite(node: Any, change: Change, scope: Optional[str] = None) -> Any:
    """Copy a config's fields, with each dict in them changed.

    Args:
        node: The fields, or a part of them.
        change: Gets each dict, the inner ones first, as a copy that it may
            change in place.
        scope: The scope that ``node`` stands in.
    """
    if isinstance(node, (list, tuple)):
        return type(node)(rewrite(item, change, scope) for item in node)
    if not isinstance(node, dict):
        return node
    scope = node.get('_scope_', scope)
    return change(
        {k: rewrite(v, change, scope) for k, v in node.items()}, scope
    )


def dicts_of(
    node: Any, scope: Optional[str] = None
) -> Iterator[Tuple[dict, Optional[str]]]:
    """All dicts in a config's fields, each with the scope it stands in.

    Args:
        node: The fields, or a part of them.
        scope: The scope that ``node`` stands in.
    """
    if isinstance(node, dict):
        scope = node.get('_scope_', scope)
        yield node, scope
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from dicts_of(item, scope)


def _tree(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _tree(child)


def _lookup(registry: Optional[Registry], name: str) -> Optional[Any]:
    """What a registry, or one that it falls back to, has under a name."""
    while registry is not None:
        if name in registry.module_dict:
            return registry.module_dict[name]
        registry = registry.parent
    return None
