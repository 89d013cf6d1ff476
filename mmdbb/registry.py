# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Registries: names in configs, and the classes that they stand for.

They work like mmengine's registries, but need torch only. If mmengine is
installed, :mod:`mmdbb.mm.registration` listens to the registry of blocks and
registers each block as a convolution layer for OpenMMLab's configs.
"""

from __future__ import annotations

from typing import Callable, Dict, List, Optional

from torch import nn

#: Function that gets name and class of each registered class, once.
Listener = Callable[[str, type], None]


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
        self.module_dict: Dict[str, type] = {}
        self._listeners: List[Listener] = []

    def __contains__(self, name: str) -> bool:
        return name in self.module_dict

    def get(self, name: str) -> Optional[type]:
        """The class that is registered under a name, or None.

        Args:
            name: The name in configs.
        """
        return self.module_dict.get(name)

    def register_module(
        self,
        name: Optional[str] = None,
        module: Optional[type] = None,
        force: bool = False,
    ):
        """Register a class: as a decorator, or by ``module=``.

        Args:
            name: The name in configs; by default the name of the class.
            module: The class. Without one, this returns a decorator.
            force: Whether to replace a class that already has the name.

        Raises:
            KeyError: If another class has the name, and ``force`` is False.
        """

        def register(cls: type) -> type:
            key = cls.__name__ if name is None else name
            if key in self.module_dict and not force:
                raise KeyError(
                    f'{key} is already registered as a {self.kind}, by '
                    f'{self.module_dict[key].__module__}; force=True takes '
                    'its name'
                )
            for listener in self._listeners:
                listener(key, cls)  # raises to refuse the class
            self.module_dict[key] = cls
            return cls

        return register if module is None else register(module)

    def follow(self, listener: Listener) -> None:
        """Call a listener for all classes, now and whenever one is added.

        Args:
            listener: The function to call with name and class. When a class
                is added, it can refuse the class by raising an error.
        """
        for name, cls in self.module_dict.items():
            listener(name, cls)
        self._listeners.append(listener)


#: Branches by their names in a block's ``branches``.
BRANCHES = Registry('branch')

#: Blocks by their names in ``conv_cfg``.
BLOCKS = Registry('block')

#: Norms by their names in ``norm_cfg``, as OpenMMLab's configs have them.
NORMS = Registry('norm')
NORMS.register_module('BN', nn.BatchNorm2d)
NORMS.register_module('BN2d', nn.BatchNorm2d)
NORMS.register_module('SyncBN', nn.SyncBatchNorm)
