# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Files of ``torch.save``, read by mmdbb itself.

``torch.load`` neither looks at the checksums of such an archive nor bounds
what a small file may claim, and before torch 2.6 it can be made to run code.
Here every member is checked against its sum as it is read, the pickle is read
as data (:mod:`mmdbb.files.pickled`), and what it says is made of a short
list (:mod:`mmdbb.files.values`). The same on every torch.

https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import sys
import warnings
import zipfile
from typing import Any, BinaryIO, Dict, Tuple

import torch
from torch import Tensor

from mmdbb.files.pickled import DamagedPickle, Items, read_pickle
from mmdbb.files.values import (
    Budget,
    DamagedValue,
    Values,
    storage_dtype,
)

#: A file may become so many times its size in memory, and so much more.
UNPACKED_TIMES = 16
UNPACKED_MORE = 64 << 20
#: So many values, and one more for so many bytes.
VALUES = 1 << 19
BYTES_A_VALUE = 16
#: Of the pickle.
STEPS_A_VALUE = 4

#: How the form before torch 1.6 begins: torch's magic number, pickled.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_CHUNK = 1 << 20


def read_torch(path: str) -> Any:
    """Read what ``torch.save`` wrote, as data.

    Args:
        path: Of a regular file.

    Returns:
        What was saved, its tensors on the CPU.

    Raises:
        NotAllowed: If the file holds more than data.
        Exception: Of whatever kind, if it is damaged.
    """
    with open(path, 'rb') as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        limits = _limits(size)
        if file.read(2) == b'PK':
            with zipfile.ZipFile(file) as archive:
                return _read_archive(archive, limits)
        file.seek(0)
        return _read_legacy(file, size, limits)


def _limits(size: int) -> Budget:
    return Budget(
        VALUES + size // BYTES_A_VALUE,
        UNPACKED_MORE + UNPACKED_TIMES * size,
    )


# The archive, from torch 1.6 on


def _read_archive(archive: zipfile.ZipFile, limits: Budget) -> Any:
    members = _members(archive, limits.size)
    _allow_no_sums(archive)
    said = read_pickle(
        io.BytesIO(_content(archive, members.pop('data.pkl'))),
        STEPS_A_VALUE * limits.values,
    )
    order = members.pop('byteorder', None)
    if order and _content(archive, order) != sys.byteorder.encode():
        raise DamagedValue('numbers in another order of bytes')
    storages: Dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in storages:
            storages[key] = _numbers(
                _content(archive, members.pop(f'data/{key}')), dtype
            )
        return _as_claimed(storages[key], dtype, count)

    value = Values(storage, limits).make(said.value)
    # What nothing refers to is looked at too.
    for member in members.values():
        _content(archive, member)
    return value


def _members(
    archive: zipfile.ZipFile, size: int
) -> Dict[str, zipfile.ZipInfo]:
    """The members by their names within the archive's one folder."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if len(set(names)) < len(names):
        raise DamagedValue('two members of one name')
    if sum(info.file_size for info in infos) > size:
        raise DamagedValue(
            f'it would be unpacked to more than {size:,} bytes, which is too '
            'much for its size'
        )
    roots = [n for n in names if n.count('/') == 1 and n.endswith('/data.pkl')]
    if len(roots) != 1:
        raise DamagedValue('an archive of something else')
    start = roots[0][: -len('data.pkl')]
    members = {
        info.filename[len(start) :]: info
        for info in infos
        if info.filename.startswith(start)
    }
    if 'constants.pkl' in members:
        raise DamagedValue('a TorchScript program')
    return members


def _allow_no_sums(archive: zipfile.ZipFile) -> None:
    """Read what ``set_crc32_options(False)`` left without any sum."""
    infos = archive.infolist()
    if any(info.CRC for info in infos):
        return
    warnings.warn(
        f'{archive.filename} was written without checksums, so damage to its '
        'numbers cannot be seen',
        stacklevel=2,
    )
    for info in infos:
        del info.CRC  # zipfile compares it if there is one


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytearray:
    """All bytes of a member; zipfile compares their sum at the end."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DamagedValue('a member that is packed in another way')
    content = bytearray(info.file_size)
    with archive.open(info) as member:
        _fill(member, content)
        if member.read(1):
            raise DamagedValue('a member that is larger than it says')
    return content


# The form before


def _read_legacy(file: BinaryIO, size: int, limits: Budget) -> Any:
    steps = STEPS_A_VALUE * limits.values
    try:
        head = [read_pickle(file, 9).value for _ in range(2)]
    except DamagedPickle:
        head = []
    if head != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise DamagedPickle('no pickle of tensors')
    system = dict(_pairs(read_pickle(file, 99).value))
    if system.get('little_endian') is not (sys.byteorder == 'little'):
        raise DamagedValue('numbers in another order of bytes')
    said = read_pickle(file, steps)
    keys = read_pickle(file, steps).value
    dtypes = {}
    for outside in said.outside:
        # Then come the device, the count, and views of torch before 0.4.
        _, kind, key, _, count, *view = outside.key
        if view != [None]:
            raise DamagedValue('a storage that is a view')
        dtypes[key] = storage_dtype(kind)
    places: Dict[str, Tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(file.read(8), 'little', signed=True)
        length = count * dtypes[key].itemsize
        place = file.tell()
        if count < 0 or place + length > size:
            raise EOFError('it ends too early')
        places[key] = (place, length)
        file.seek(length, io.SEEK_CUR)
    if file.tell() != size:
        raise DamagedValue('something behind its end')
    storages: Dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in storages:
            place, length = places[key]
            content = bytearray(length)
            file.seek(place)
            _fill(file, content)
            storages[key] = _numbers(content, dtype)
        return _as_claimed(storages[key], dtype, count)

    return Values(storage, limits).make(said.value)


def _pairs(said: Any) -> Items:
    if type(said) is not Items:
        raise DamagedPickle('no pickle of tensors')
    return said


# Both


def _fill(file: BinaryIO, content: bytearray) -> None:
    view = memoryview(content)
    done = 0
    while done < len(content):
        part = file.readinto(view[done : done + _CHUNK])
        if not part:
            raise EOFError('it ends too early')
        done += part


def _numbers(content: bytearray, dtype: torch.dtype) -> Tensor:
    if not content:
        return torch.empty(0, dtype=dtype)
    if dtype is torch.bool:
        # Another byte than 0 and 1 would be neither.
        return torch.frombuffer(content, dtype=torch.uint8) != 0
    return torch.frombuffer(content, dtype=dtype)


def _as_claimed(numbers: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    if numbers.dtype is not dtype or numbers.numel() != count:
        raise DamagedValue('a storage of another size or type than it says')
    return numbers
