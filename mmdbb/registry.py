# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Names in configs, and the classes that they stand for.

A registry works as mmengine's does, and needs torch only. Where mmengine is
installed, :mod:`mmdbb.mm.registration` follows the blocks, so that each of
them is a convolution layer in OpenMMLab's configs too.
"""

from __future__ import annotations

from typing import Callable, Dict, List, Optional

from torch import nn

#: Is told the name and the class of whatever is registered.
Listener = Callable[[str, type], None]


class Registry:
    """Classes by their names.

    Args:
        kind: What the classes are, for messages.

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
        """The class of a name; None if there is none."""
        return self.module_dict.get(name)

    def register_module(
        self,
        name: Optional[str] = None,
        module: Optional[type] = None,
        force: bool = False,
    ):
        """Register a class: as a decorator, or by ``module=``.

        Args:
            name: The name in configs, by default the class's own.
            module: The class; without one, a decorator is returned.
            force: Whether the name may be taken from another class.

        Raises:
            KeyError: If the name is taken.
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
                listener(key, cls)  # which may refuse it
            self.module_dict[key] = cls
            return cls

        return register if module is None else register(module)

    def follow(self, listener: Listener) -> None:
        """Tell a listener of all classes there are, and of all to come."""
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
