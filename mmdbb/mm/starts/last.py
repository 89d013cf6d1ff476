# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Base classes of initialisers that must run after all others.

An initialiser that loads weights must run last, or others overwrite them.
mmengine runs only rules named ``Pretrained`` last. It applies all other rules
first and then lets the children initialise themselves, as mmcv's
``ConvModule`` does. The classes here change that order for mmdbb's rules.
"""

from __future__ import annotations

from mmengine.logging import print_log
from mmengine.model import update_init_info
from torch import nn

from mmdbb.errors import UserError
from mmdbb.mm.host_internals import (
    initialize_children,
    is_initializing,
    say_pretrained,
)


class AppliedLast:
    """Base of mmdbb's initialisers, which run after those of all children.

    Raises:
        UserError: If another rule of the same ``init_cfg`` would overwrite
            the values that this one gives.
    """

    #: The rule's name in the registry, and so in a config.
    type_name = ''

    def fill(self, module: nn.Module) -> None:
        """Set the start values of a module; subclasses implement it.

        Args:
            module: The module whose ``init_cfg`` has this rule.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        """The line about this rule in the log."""
        return self.type_name

    def __call__(self, module: nn.Module) -> None:
        """Initialise the module's children, then set its start values.

        Args:
            module: The module whose ``init_cfg`` has this rule.
        """
        initializing = is_initializing(module)
        if initializing:
            self._refuse_later_rules(module)
            _take_back(module)
            initialize_children(module)
        print_log(str(self), logger='current')
        self.fill(module)
        if initializing:
            update_init_info(module, init_info=str(self))

    def _refuse_later_rules(self, module: nn.Module) -> None:
        rules = module.init_cfg
        if isinstance(rules, dict):
            return
        types = [getattr(r['type'], '__name__', r['type']) for r in rules]
        own = (self.type_name, type(self).__name__)
        if types[-1] not in own or any(
            name in ('Pretrained', 'PretrainedInit') for name in types
        ):
            raise UserError(
                f'init_cfg of type {self.type_name!r} must be the last of '
                f"the list, without a 'Pretrained' beside it; got {types}"
            )


def _take_back(module: nn.Module) -> None:
    """Remove a module's ``init_cfg`` from its children.

    mmpretrain's RepVGG passes its own ``init_cfg`` to each of its blocks. A
    checkpoint of the whole network would then be loaded into every block,
    and fit none.
    """
    for child in module.modules():
        rules = getattr(child, 'init_cfg', None)
        if child is not module and rules and rules == module.init_cfg:
            child.init_cfg = None


class LoadedLast(AppliedLast):
    """Base of the initialisers that load a checkpoint.

    Backbones of the OpenMMLab packages end their initialisation with steps of
    their own, such as ``zero_init_residual``. These do not change the loaded
    weights either.

    Args:
        checkpoint: Path or address of the weights.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def load(self, module: nn.Module) -> None:
        """Load the checkpoint into a module; subclasses implement it.

        Args:
            module: The module whose ``init_cfg`` has this rule.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        """The line in the log, which names the checkpoint."""
        return f'{self.type_name}: start from {self.checkpoint}'

    def fill(self, module: nn.Module) -> None:
        """Load the weights, and tell the module that they are pretrained.

        Args:
            module: The module whose ``init_cfg`` has this rule.
        """
        self.load(module)
        if is_initializing(module):
            say_pretrained(module, self.checkpoint)
