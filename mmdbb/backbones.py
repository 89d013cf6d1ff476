# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Backbones with blocks, for mmpretrain and through it for mmdet and mmseg."""

import importlib

try:
    importlib.import_module('mmdbb.mm')
except ImportError as error:
    if not hasattr(error, 'beside'):
        raise
    # One message for all three packages.
    raise error.beside('mmpretrain') from None

from mmdbb.mm.backbones import *  # noqa: F403
from mmdbb.mm.backbones import __all__  # noqa: F401
