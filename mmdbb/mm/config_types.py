# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The types in a config: from a type to its class, and back.

Under ``type`` a config has a class itself, its name in a registry with or
without the scope of its package (``mmdet.ResNet``), or its import path
(``mmdet.models.backbones.resnet.ResNet``). A type that is in no registry and
cannot be imported gives None and no error: a config also has types for
registries other than the one that is asked.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator, Optional, Tuple

from mmengine.registry import MODELS, Registry
from mmengine.utils import get_object_from_string

#: A function that maps a dict in a config, and its scope, to a new dict.
Change = Callable[[dict, Optional[str]], dict]


def class_of(
    type_: Any, scope: Optional[str] = None, registry: Registry = MODELS
) -> Optional[Any]:
    """Find the class, or the function, that a type in a config names.

    Args:
        type_: The value under ``type`` in the config.
        scope: The package in whose registry to look up a name without scope.
            If it is None or has no registry, all registries are searched.
        registry: Any of the registries for this kind of thing. mmengine's and
            those of the OpenMMLab packages form a tree, so one leads to all.

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
    """Look up a name in the registries, without importing anything.

    Args:
        name: The name, with or without the scope of its package.
        scope: The package in whose registry to look up a name without scope.
            If it is None or has no registry, all registries are searched.
        registry: Any of the registries for this kind of thing.

    Returns:
        The class or the function; None if no registry has the name.
    """
    registries = {r.scope: r for r in _tree(registry.root)}
    first, _, rest = name.partition('.')
    if rest:
        return _lookup(registries.get(first), rest)
    if scope in registries:
        return _lookup(registries[scope], name)
    known = (r.module_dict.get(name) for r in registries.values())
    return next((found for found in known if found is not None), None)


def type_of(kind: Any, registry: Registry = MODELS) -> Optional[str]:
    """The type that names a class in a config of any scope.

    Args:
        kind: A class, or a function.
        registry: Any of the registries for this kind of thing.

    Returns:
        str: The registered name with its scope, such as ``mmdet.ResNet``; a
        name in mmengine's registry, which all packages share, has no scope.
        None if the class is not registered.

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
    """The name of the module that defines a class or a function.

    Args:
        kind: The class or the function.
    """
    return getattr(kind, '__module__', None) or ''


def is_own(kind: Any) -> bool:
    """Whether mmdbb defines a class or a function.

    Args:
        kind: The class or the function.
    """
    return is_within(module_of(kind), 'mmdbb')


def is_within(module: str, package: str) -> bool:
    """Whether a module is a package itself, or a module inside it.

    Args:
        module: Name of the module.
        package: Name of the package.
    """
    return f'{module}.'.startswith(f'{package}.')


def rewrite(node: Any, change: Change, scope: Optional[str] = None) -> Any:
    """Copy a config's fields, and apply a function to each dict in them.

    Args:
        node: The fields, or a part of them.
        change: The function. It is called for inner dicts first, with a copy
            that it may change in place, and returns the dict to use.
        scope: The scope of ``node``: the package whose registry its types
            belong to. A ``_scope_`` in a dict replaces it for that dict.

    Returns:
        The changed copy.
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
    """All dicts in a config's fields, each with its scope.

    Args:
        node: The fields, or a part of them.
        scope: The scope of ``node``: the package whose registry its types
            belong to. A ``_scope_`` in a dict replaces it for that dict.

    Yields:
        tuple: A dict and its scope.
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
    """Look up a name in a registry, then in the registries above it."""
    while registry is not None:
        if name in registry.module_dict:
            return registry.module_dict[name]
        registry = registry.parent
    return None
