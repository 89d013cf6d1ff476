# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Initialisers that must come last of all, such as those that load weights.

mmengine applies a rule of type ``Pretrained`` last, by that name. Any other
is applied before the children initialise themselves (mmcv's ``ConvModule``
does), which would overwrite what it gives them.
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
    """Base of mmdbb's initialisers: applied after those of all children.

    Raises:
        UserError: If another rule of the same ``init_cfg`` would overwrite
            what this one does.
    """

    #: The name in the registry.
    type_name = ''

    def fill(self, module: nn.Module) -> None:
        """Give the module its start."""
        raise NotImplementedError

    def __str__(self) -> str:
        """What is done, for the log."""
        return self.type_name

    def __call__(self, module: nn.Module) -> None:
        """Give the module its start, last of all that initialises it."""
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
    """Leave a rule to the module that it is for.

    mmpretrain's RepVGG hands its ``init_cfg`` on to each of its blocks, none
    of which a checkpoint of the whole fits.
    """
    for child in module.modules():
        rules = getattr(child, 'init_cfg', None)
        if child is not module and rules and rules == module.init_cfg:
            child.init_cfg = None


class LoadedLast(AppliedLast):
    """Base of the initialisers that load a checkpoint.

    Not even the hosts' last steps, such as ``zero_init_residual``, change
    what is loaded.

    Args:
        checkpoint: Where the weights come from, for messages.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def load(self, module: nn.Module) -> None:
        """Fill the module."""
        raise NotImplementedError

    def __str__(self) -> str:
        """What is loaded, for the log."""
        return f'{self.type_name}: start from {self.checkpoint}'

    def fill(self, module: nn.Module) -> None:
        """Load the weights, and tell the host that they are loaded."""
        self.load(module)
        if is_initializing(module):
            say_pretrained(module, self.checkpoint)
