# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Backbones with blocks, for mmpretrain and through it for mmdet and mmseg."""

from mmdbb.mm.backbones import *  # noqa: F403
from mmdbb.mm.backbones import __all__  # noqa: F401
