# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Initialisers that load weights, and so must come last of all.

mmengine applies a rule of type ``Pretrained`` last, by that name. Any other
is applied before the children initialise themselves (mmcv's ``ConvModule``
does) and before the hosts' last steps (``zero_init_residual``), which would
overwrite what it loads.
"""

from __future__ import annotations

from mmengine.logging import print_log
from mmengine.model import update_init_info
from torch import nn

from mmdbb.errors import UserError


class LoadedLast:
    """Base of the initialisers that load a checkpoint.

    Args:
        checkpoint: Where the weights come from, for messages.

    Raises:
        UserError: If another rule of the same ``init_cfg`` would overwrite
            the weights.
    """

    #: The name in the registry.
    type_name = ''

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def load(self, module: nn.Module) -> None:
        """Fill the module."""
        raise NotImplementedError

    def __call__(self, module: nn.Module) -> None:
        """Fill the module, last of all that initialises it."""
        initializing = hasattr(module, '_params_init_info')
        if initializing:
            self._refuse_later_rules(module)
            _initialize_children(module)
        info = f'{self.type_name}: start from {self.checkpoint}'
        print_log(info, logger='current')
        self.load(module)
        if initializing:
            # The hosts' own last steps (zero_init_residual) ask for this
            # type, and leave pretrained weights alone.
            module.init_cfg = dict(
                type='Pretrained', checkpoint=self.checkpoint
            )
            update_init_info(module, init_info=info)

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


def _initialize_children(module: nn.Module) -> None:
    """Do now what mmengine would do after this rule, and so overwrite it."""
    for child in module.children():
        if hasattr(child, 'init_weights') and not getattr(
            child, 'is_init', False
        ):
            child.init_weights()
            child.is_init = True
