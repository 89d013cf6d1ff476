# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What the lower storey leaves to OpenMMLab's packages, where there are any.

The blocks need torch only. In a few places mmengine or mmcv have a say if
they are installed: which norm a config names, how ``init_cfg`` is applied,
where a log goes. Each is one attribute of :data:`PORTS`, whose default does
without; :mod:`mmdbb.mm.registration` plugs the packages in.
"""

from __future__ import annotations

import logging
from types import FrameType
from typing import Callable, Dict, Optional

from torch import nn

from mmdbb.errors import UserError


def _log(message: str, level: int = logging.INFO) -> None:
    logging.getLogger('mmdbb').log(level, message)


def _initialize(module: nn.Module, init_cfg) -> None:
    raise UserError(
        f'init_cfg={init_cfg!r} of a {type(module).__name__} is a rule of '
        'mmengine, which is not installed; initialise the block after it is '
        'built, or install mmengine and mmcv'
    )


def _read_address(address: str) -> dict:
    raise UserError(
        f'{address} is an address, which mmengine reads, and mmengine is not '
        'installed; give the path of a file, or a state dict'
    )


class Ports:
    """The places where packages of OpenMMLab plug in.

    Attributes:
        find_layer: From a type in a config to the class or the function that
            OpenMMLab's registry has for it; None if it has none.
        initialize: Applies ``init_cfg`` to a module.
        is_host_rule: Whether a function given to ``Module.apply`` is one of
            a host's initialisation rules.
        refuse_fusion: Raises if the caller, whose frame it gets, goes on to
            fuse a norm into the wrong convolution.
        log: Writes a message to the log.
        read_address: Reads a checkpoint from an address such as
            ``torchvision://resnet50``.
        history: Makes a log's history as mmengine stores it in checkpoints,
            of its longest length, its values and their counts.
        classes: Full name of a class in checkpoints -> the class.
    """

    def __init__(self) -> None:
        self.find_layer: Callable[[str], Optional[object]] = lambda name: None
        self.initialize: Callable[..., None] = _initialize
        self.is_host_rule: Callable[[Callable], bool] = lambda rule: False
        self.refuse_fusion: Callable[[nn.Module, FrameType], None] = (
            lambda block, caller: None
        )
        self.log: Callable[..., None] = _log
        self.read_address: Callable[[str], dict] = _read_address
        self.history: Optional[Callable] = None
        self.classes: Dict[str, type] = {}


PORTS = Ports()
