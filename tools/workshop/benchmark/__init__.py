# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What blocks cost, in time and memory."""

from .growth import AXES, Point, growth
from .imports import ImportTime, import_times
from .large_kernels import KernelRow, large_kernels
from .measure import Spread, interleaved, kept_megabytes, peak_megabytes
from .papers import papers_way
from .phases import (
    NETWORKS,
    PHASES,
    PRECISIONS,
    Row,
    composing_bound,
    run_phase,
)
from .processes import sync_rows

__all__ = [
    'AXES',
    'ImportTime',
    'KernelRow',
    'NETWORKS',
    'PHASES',
    'PRECISIONS',
    'Point',
    'Row',
    'Spread',
    'composing_bound',
    'growth',
    'import_times',
    'interleaved',
    'kept_megabytes',
    'large_kernels',
    'papers_way',
    'peak_megabytes',
    'run_phase',
    'sync_rows',
]
