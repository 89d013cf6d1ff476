# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Pruning: penalties on merged kernels, and networks with fewer filters."""

from mmdbb.mm.pruning.penalty import KernelPenaltyHook
from mmdbb.mm.pruning.pipeline import prune_checkpoint
from mmdbb.mm.pruning.structure import prune_

__all__ = [
    'KernelPenaltyHook',
    'prune_',
    'prune_checkpoint',
]
