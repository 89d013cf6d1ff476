# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""``init_cfg=dict(type='RepOpt', scales=...)``: RepOptimizer's start."""

from __future__ import annotations

from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from mmdbb.errors import UserError
from mmdbb.mm.starts.last import AppliedLast
from mmdbb.repopt import load_scales, start_as_branches_


@WEIGHT_INITIALIZERS.register_module(name='RepOpt')
class RepOptInit(AppliedLast):
    """Start a plain network as a network of scaled branches starts.

    The rule belongs into the ``init_cfg`` of the whole model, because the
    scales have its layers' names. It runs after all other initialisation, and
    before a checkpoint is loaded or resumed.

    Args:
        scales: The file that ``tools/repopt.py`` wrote.

    Raises:
        UserError: If the file is missing or does not fit the network, or
            another rule of the same ``init_cfg`` would run later.
    """

    type_name = 'RepOpt'

    def __init__(self, scales: str) -> None:
        self.scales = scales

    def __str__(self) -> str:
        """The line in the log, which names the file."""
        return f'{self.type_name}: start as scaled branches of {self.scales}'

    def fill(self, module: nn.Module) -> None:
        """Give the convolutions that have scales their start.

        Args:
            module: The model whose ``init_cfg`` has this rule.
        """
        scales = load_scales(self.scales)
        try:
            start_as_branches_(module, scales)
        except ValueError as error:
            raise UserError(
                f'{self.scales}: {error} (init_cfg of type '
                f'{self.type_name!r} belongs into the whole model)'
            ) from error
