# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Read a checkpoint by torch's own reader, with code left out.

A proof whose two sides come from one reader repeats that reader's mistakes. So
weights are read a second time: by ``torch.load`` and Python's ``pickle``,
which share nothing with :mod:`mmdbb.files.torch_files` but the file. This is
for files that the first reader has taken as data. Tensors and dicts are made
as torch makes them; whatever else a pickle names becomes an empty object, so
nothing of the file is run.
"""

from __future__ import annotations

import pickle
import types
import warnings
import zipfile
from collections import OrderedDict
from typing import Any, Callable, Dict, Tuple

import torch

#: What a pickle may name, beside torch's storages, which torch looks up.
_MADE: Dict[Tuple[str, str], Callable] = {
    ('torch._utils', name): getattr(torch._utils, name)
    for name in ('_rebuild_tensor_v2', '_rebuild_parameter')
}
_MADE['collections', 'OrderedDict'] = OrderedDict


class _Nothing:
    """Takes the place of an object, and forgets all that it is given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return _Nothing()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _MADE.get((module, name), _Nothing)


def _as_module() -> types.ModuleType:
    """A module that ``torch.load`` takes as its ``pickle_module``."""
    module: Any = types.ModuleType('pickle')
    module.Unpickler = _Unpickler
    module.load = lambda file, **kwargs: _Unpickler(file, **kwargs).load()
    return module


def read_by_torch(path: str) -> Any:
    """Read a file of ``torch.save`` by ``torch.load``.

    Args:
        path: A file that :func:`mmdbb.files.torch_files.read_torch` takes.

    Returns:
        The saved object, with its tensors on the CPU. Objects other than
        tensors, containers and plain values are empty.

    Raises:
        Exception: Any error, if torch cannot read the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about old formats
        return torch.load(
            path,
            map_location='cpu',
            pickle_module=_as_module(),
            weights_only=False,
            mmap=_can_be_mapped(path),
        )


def _can_be_mapped(path: str) -> bool:
    """Whether the file is an archive whose members are not compressed."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(
            info.compress_type == zipfile.ZIP_STORED
            for info in archive.infolist()
        )
