# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Lets torch's safe loader read the checkpoints that mmengine writes.

Since torch 2.6 `torch.load` refuses everything but tensors and plain Python
data unless it is allow-listed (`weights_only=True`). A checkpoint of
mmengine's Runner also holds the message hub: `HistoryBuffer` objects, their
numpy arrays, and the buffer's own statistics methods, pickled as
`getattr(HistoryBuffer, 'mean')`. mmengine 0.10.7 therefore cannot test with
or resume from its own files. Exactly these are allowed here. `getattr` itself
would open the door to everything, so a stand-in that knows four names is
registered in its place. So is one for `HistoryBuffer`, which takes over what
a file says of its statistics for the whole process.

https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any, Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from packaging.version import Version

# What HistoryBuffer registers for itself.
STATISTICS = ('min', 'max', 'current', 'mean')

# The types of numbers in a HistoryBuffer or among the logged values.
NUMBERS = ('float64', 'float32', 'int64', 'int32', 'bool')


def allow_mmengine_checkpoints() -> None:
    """Allow-list what mmengine's own checkpoints hold, for this process.

    Does nothing where `torch.load` is not strict by default (before torch
    2.6). Calling it again changes nothing.

    Example:
        >>> from mmdbb.checkpoint.safe_globals import (
        ...     allow_mmengine_checkpoints)
        >>> allow_mmengine_checkpoints()
    """
    if Version(torch.__version__).release < (2, 6):
        return
    torch.serialization.add_safe_globals(
        [
            (_ReadBuffer, f'{HistoryBuffer.__module__}.HistoryBuffer'),
            (_statistics_method, 'builtins.getattr'),
            np.ndarray,
            np.dtype,
            *(type(np.dtype(number)) for number in NUMBERS),
            *_numpy_functions(),
        ]
    )


class _ReadBuffer(HistoryBuffer):
    """Stand in for `HistoryBuffer` while a file is read, then become it.

    Raises:
        UnpicklingError: The file's statistics are not the buffer's own.
    """

    def __setstate__(self, state: dict) -> None:
        methods = state.get('statistics_methods', {})
        for name, method in methods.items():
            if method is not _statistics_method(HistoryBuffer, name):
                raise UnpicklingError(
                    f'the checkpoint has a HistoryBuffer whose {name!r} is '
                    'another function'
                )
        super().__setstate__(state)
        self.__class__ = HistoryBuffer


def _statistics_method(owner: Any, name: Any) -> Callable:
    """Stand in for `getattr`: HistoryBuffer's own statistics, nothing else.

    Raises:
        UnpicklingError: Any other object or attribute is asked for.
    """
    if owner in (HistoryBuffer, _ReadBuffer) and name in STATISTICS:
        return getattr(HistoryBuffer, name)
    raise UnpicklingError(
        f'the checkpoint asks for attribute {name!r} of {owner!r}; allowed '
        f'are HistoryBuffer and {", ".join(STATISTICS)}'
    )


def _numpy_functions() -> list[tuple[Callable, str]]:
    """Return numpy's array and scalar builders under all of their names.

    numpy 2 moved `numpy.core` to `numpy._core`; files of either age are read
    by either numpy.
    """
    build_array = np.empty(0).__reduce__()[0]
    build_scalar = np.float64(0).__reduce__()[0]
    return [
        (function, f'{package}.multiarray.{name}')
        for package in ('numpy.core', 'numpy._core')
        for function, name in (
            (build_array, '_reconstruct'),
            (build_scalar, 'scalar'),
        )
    ]
