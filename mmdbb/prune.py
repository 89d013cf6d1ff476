# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Pruning: penalties on merged kernels, and networks with fewer filters."""

from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.evaluation.metric import Metric
from mmdbb.mm.outputs import Source
from mmdbb.mm.pruning.fine_tuning import PruneOptions
from mmdbb.mm.pruning.penalty import KernelPenaltyHook, kernel_penalty
from mmdbb.mm.pruning.pipeline import Pruned, prune_checkpoint
from mmdbb.mm.pruning.structure import prune_

__all__ = [
    'Calibration',
    'KernelPenaltyHook',
    'Metric',
    'PruneOptions',
    'Pruned',
    'Source',
    'kernel_penalty',
    'prune_',
    'prune_checkpoint',
]
