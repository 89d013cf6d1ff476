# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The private parts of mmengine and mmcv that mmdbb relies on.

A host may change them in any version. Each has a function here, the versions
in which it was seen, and a test in ``tests/test_mm/test_host_internals.py``
that fails where a host no longer has it.
"""

from __future__ import annotations

import logging
from types import FrameType
from typing import Callable, Optional

import numpy as np
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import initialize
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.mm.hosts import is_installed
from mmdbb.ports import Ports


def plug_in(ports: Ports) -> None:
    """Give the lower storey what it asks of mmengine and mmcv."""
    ports.initialize = initialize
    ports.is_host_rule = is_init_rule
    ports.refuse_fusion = refuse_wrong_fusion
    ports.log = log
    ports.history = history
    ports.classes = {
        'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
        'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler': (
            OneCycleParamScheduler
        ),
    }


def cure_config_bases() -> None:
    """Let ``_base_ = 'mmseg::...'`` find the onedl fork's configs.

    mmengine (0.10.7, onedl 0.10.12) looks for a distribution that a table
    names, ``mmsegmentation``, which the fork is not. Where there is none, the
    module's own name serves: mmengine then finds the package by importing it.
    Takes effect on configs that are read afterwards.
    """
    if not is_installed('mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def log(message: str, level: int = logging.INFO) -> None:
    """Write to the log of the run, if there is one."""
    print_log(message, logger='current', level=level)


def is_init_rule(rule: Callable) -> bool:
    """Whether a function is what mmengine applies of ``init_cfg``.

    Its rules are local functions of this module (mmengine 0.10.7).
    """
    return getattr(rule, '__module__', None) == 'mmengine.model.weight_init'


def history(
    max_length: int, values: np.ndarray, counts: np.ndarray
) -> HistoryBuffer:
    """A ``HistoryBuffer`` of given content (mmengine 0.10.7).

    Its constructor would copy the arrays into lists and back.
    """
    made = HistoryBuffer(max_length=max_length)
    made._log_history, made._count_history = values, counts
    return made


def refuse_wrong_fusion(block: nn.Module, caller: FrameType) -> None:
    """Raise if the walk that came to a block goes on to a wrong fusion.

    mmcv's ``fuse_conv_bn`` (2.1.0) walks through the children of each module
    in their order, and fuses a norm into the convolution that it saw last. A
    block that is not merged is no ``nn.Conv2d``, so it is not seen: the norm
    behind a block would be fused into a plain convolution before it. The
    hosts call that function when they load a network, and nothing tells a
    child of it but the walk through the child's own children; so there, and
    only if that function walks, its frames are read.

    Args:
        block: The block whose children are asked for.
        caller: The frame of whoever asks.

    Raises:
        ValueError: If it is ``fuse_conv_bn``, and of a module around the
            block it would fuse a norm that follows the block, or what holds
            the block, into a convolution that precedes it.
    """
    child, outer = block, caller.f_back
    while _is_fusing(caller) and _is_fusing(outer):
        parent, seen = outer.f_locals['module'], outer.f_locals['last_conv']
        norm = _next_norm(parent, child)
        if seen is not None and norm is not None:
            raise ValueError(
                f'fuse_conv_bn would fuse {norm!r} of a '
                f'{type(parent).__name__} into '
                f'{outer.f_locals["last_conv_name"]!r}, although a '
                f'{type(block).__name__} stands between them; merge first: '
                'fuse_conv_bn(mmdbb.reparameterize(model))'
            )
        child, outer = parent, outer.f_back


def _is_fusing(frame: Optional[FrameType]) -> bool:
    return (
        frame is not None
        and frame.f_code.co_name == 'fuse_conv_bn'
        and {'module', 'last_conv', 'last_conv_name'} <= set(frame.f_locals)
    )


def _next_norm(parent: nn.Module, child: nn.Module) -> Optional[str]:
    """Name of the norm after a child, if no convolution comes before it."""
    children = iter(parent._modules.items())
    for _, module in children:
        if module is child:
            break
    for name, module in children:
        if isinstance(module, _BatchNorm):
            return name
        if isinstance(module, nn.Conv2d):
            return None
    return None
