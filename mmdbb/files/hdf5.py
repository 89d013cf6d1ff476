# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Read the papers' old ``.hdf5`` files, with one data set for each parameter.

Such a file can point to other files, or claim to be far larger than it is. So
its entries are checked before numbers are read: only data sets in the file
itself are allowed. The parser is libhdf5, a library in C that was not made for
hostile files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import torch
from torch import Tensor

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import check_regular
from mmdbb.files.sources import shown, some
from mmdbb.files.torch_files import UNPACKED_MORE, UNPACKED_TIMES

SIGNATURE = b'\x89HDF\r\n\x1a\n'


def is_hdf5(path: str) -> bool:
    """Whether a path is a regular file in HDF5 format."""
    if not Path(path).is_file():
        return False
    with open(path, 'rb') as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def read_hdf5(path: str) -> Dict[str, Tensor]:
    """Read all data sets of an HDF5 file.

    Args:
        path: The file.

    Returns:
        dict: Names -> tensors.

    Raises:
        UserError: If h5py is missing, or the file is damaged, points to other
            files or has anything but data sets of numbers.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            f'{path} is an hdf5 file; to read it: pip install h5py'
        ) from error
    left = UNPACKED_MORE + UNPACKED_TIMES * check_regular(path, 'checkpoint')
    try:
        with h5py.File(path, 'r') as file:
            links = {name: file.get(name, getlink=True) for name in file}
            elsewhere = [
                name
                for name, link in links.items()
                if not isinstance(link, h5py.HardLink)
            ]
            if elsewhere:
                raise UserError(
                    f'{path} has links, which are not followed: '
                    f'{some(elsewhere)}'
                )
            others = [
                n for n in links if not isinstance(file[n], h5py.Dataset)
            ]
            if others:
                raise UserError(
                    f'{path} is not of the papers: {some(others)} is no data '
                    'set'
                )
            for name in links:
                left -= _size(file[name], name, path)
            if left < 0:
                raise UserError(f'{path} claims to hold too much for its size')
            return {name: _tensor(file[name]) for name in links}
    except UserError:
        raise
    except Exception as error:
        # h5py raises errors of many kinds, also for names that are not UTF-8.
        raise UserError(
            f'{path} cannot be read as hdf5, or is truncated: '
            f'{shown(" ".join(str(error).split()))}'
        ) from error


def _size(data: Any, name: str, path: str) -> int:
    """Check that a data set holds numbers in this file; return its bytes."""
    if data.external or data.is_virtual:
        raise UserError(
            f'{path} keeps {shown(name)} in another file, which is not read'
        )
    if data.shape is None or data.dtype.kind not in 'fiub':
        raise UserError(f'{path} has no numbers in {shown(name)}')
    return data.nbytes


def _tensor(data: Any) -> Tensor:
    # torch reads numbers in this machine's byte order only.
    return torch.as_tensor(data[()].astype(data.dtype.newbyteorder('=')))
