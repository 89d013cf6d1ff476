# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Registries: names in configs, and the classes that they stand for.

Classes are registered as in mmengine, but torch is enough. If mmengine is
installed, :mod:`mmdbb.mm.registration` listens to the registry of blocks and
registers each block as a convolution layer for OpenMMLab's configs.
"""

from __future__ import annotations

from typing import (
    Any,
    Callable,
    Dict,
    List,
    Optional,
    Sequence,
    Type,
    TypeVar,
    Union,
    overload,
)

from torch import nn

#: Function that gets each registered class: its name, the class, and whether
#: it may take the name from another class.
Listener = Callable[[str, type, bool], None]

_Class = TypeVar('_Class', bound=type)


class Registry:
    """A table of classes by name.

    Args:
        kind: The kind of the classes, such as ``'block'``, for messages.

    Examples:
        >>> colours = Registry('colour')
        >>> @colours.register_module(name='red')
        ... class Red:
        ...     pass
        >>> colours.get('red') is Red, 'blue' in colours
        (True, False)
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.module_dict: Dict[str, Type[Any]] = {}
        self._listeners: List[Listener] = []

    def __contains__(self, name: str) -> bool:
        return name in self.module_dict

    def get(self, name: str) -> Optional[Type[Any]]:
        """The class that is registered under a name, or None.

        Args:
            name: The name in configs.
        """
        return self.module_dict.get(name)

    def __len__(self) -> int:
        return len(self.module_dict)

    @overload
    def register_module(
        self,
        name: Union[str, Sequence[str], None] = None,
        force: bool = False,
        module: None = None,
    ) -> Callable[[_Class], _Class]: ...

    @overload
    def register_module(
        self,
        name: Union[str, Sequence[str], None] = None,
        force: bool = False,
        *,
        module: _Class,
    ) -> _Class: ...

    @overload
    def register_module(
        self,
        name: Union[str, Sequence[str], None],
        force: bool,
        module: _Class,
    ) -> _Class: ...

    def register_module(
        self,
        name: Union[str, Sequence[str], None] = None,
        force: bool = False,
        module: Optional[type] = None,
    ) -> Any:
        """Register a class: as a decorator, or by ``module=``.

        Args:
            name: The name in configs, or several; by default the name of the
                class.
            force: Whether to replace a class that already has the name.
            module: The class. Without one, this returns a decorator.

        Raises:
            KeyError: If another class has the name, and ``force`` is False.
            TypeError: If ``name`` or ``module`` is something else, as where
                ``@REGISTRY.register_module`` lacks its parentheses.
        """
        names = [name] if isinstance(name, str) else name
        if names is not None and not (
            isinstance(names, (list, tuple))
            and all(isinstance(each, str) for each in names)
        ):
            raise TypeError(
                f'name must be a string, several in a list, or None; got '
                f'{name!r}. As a decorator, write @...register_module()'
            )
        if not (module is None or isinstance(module, type)):
            raise TypeError(f'module must be a class, got {module!r}')

        def register(cls: type) -> type:
            keys = [cls.__name__] if names is None else names
            for key in keys:
                if key in self.module_dict and not force:
                    raise KeyError(
                        f'{key} is already registered as a {self.kind}, by '
                        f'{self.module_dict[key].__module__}; force=True '
                        'takes its name'
                    )
            for key in keys:
                for listener in self._listeners:
                    listener(key, cls, force)  # raises to refuse the class
                self.module_dict[key] = cls
            return cls

        return register if module is None else register(module)

    def follow(self, listener: Listener) -> None:
        """Call a listener for all classes, now and whenever one is added.

        Args:
            listener: The function to call with name, class, and whether the
                class may take the name from another one. When a class is
                added, it can refuse the class by raising an error.
        """
        for name, cls in self.module_dict.items():
            listener(name, cls, False)
        self._listeners.append(listener)


#: Branches by their names in a block's ``branches``.
BRANCHES = Registry('branch')

#: Blocks by their names in ``conv_cfg``.
BLOCKS = Registry('block')

#: Norms by their names in ``norm_cfg``, as OpenMMLab's configs have them.
NORMS = Registry('norm')
NORMS.register_module('BN', module=nn.BatchNorm2d)
NORMS.register_module('BN1d', module=nn.BatchNorm1d)
NORMS.register_module('BN2d', module=nn.BatchNorm2d)
NORMS.register_module('BN3d', module=nn.BatchNorm3d)
NORMS.register_module('SyncBN', module=nn.SyncBatchNorm)
