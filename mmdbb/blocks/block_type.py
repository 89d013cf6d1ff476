# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The type of blocks' classes: what calling a class does."""

from __future__ import annotations

import contextlib
import sys

import torch

from mmdbb.ports import PORTS


class BlockType(type):
    """The type of blocks' classes.

    In new configs a layer's type is the class itself. mmcv then calls the
    class, so the rule on the sizes of kernels has to apply there, and the
    config's keys for it. ``device`` and ``dtype`` are obeyed here, whatever
    a subclass builds.
    """

    def __call__(cls, *args, **kwargs):
        build = PORTS.builder_of(cls, sys._getframe(1))
        if build is not None:
            return build(*args, **kwargs)
        device = kwargs.get('device')
        with torch.device(device) if device else contextlib.nullcontext():
            block = super().__call__(*args, **kwargs)
        block._is_built = True
        return block.to(kwargs.get('dtype'))
