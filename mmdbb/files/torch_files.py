# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Read files of ``torch.save`` without ``torch.load``.

``torch.load`` does not compare the checksums in a file and does not bound how
much memory a small file may claim. Before torch 2.6 a file can make it run
code. This reader checks every member against its checksum, reads the pickle as
data (:mod:`mmdbb.files.pickled`), and makes only values of a short list
(:mod:`mmdbb.files.values`). It behaves the same with every torch.

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

#: Memory that a file may take: this many times its size, plus this many bytes.
UNPACKED_TIMES = 16
UNPACKED_MORE = 64 << 20
#: Values that a file may hold: this many, plus one for this many bytes of it.
VALUES = 1 << 19
BYTES_A_VALUE = 16
#: Opcodes that the pickle may have for each value.
STEPS_A_VALUE = 4

#: A file in the format before torch 1.6 begins with this magic number and this
#: version, both pickled.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_CHUNK = 1 << 20


def read_torch(path: str) -> Any:
    """Read a file that ``torch.save`` wrote.

    Args:
        path: The file, which must be a regular one.

    Returns:
        The saved object, with its tensors on the CPU.

    Raises:
        NotAllowed: If the file holds more than data.
        Exception: Any error, if the file is damaged.
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


# The zip archive, from torch 1.6 on


def _read_archive(archive: zipfile.ZipFile, limits: Budget) -> Any:
    members = _members(archive, limits.size)
    _allow_no_sums(archive)
    said = read_pickle(
        io.BytesIO(_content(archive, members.pop('data.pkl'))),
        STEPS_A_VALUE * limits.values,
    )
    order = members.pop('byteorder', None)
    if order and _content(archive, order) != sys.byteorder.encode():
        raise DamagedValue('numbers in another byte order')
    storages: Dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in storages:
            storages[key] = _numbers(
                _content(archive, members.pop(f'data/{key}')), dtype
            )
        return _as_claimed(storages[key], dtype, count)

    value = Values(storage, limits).make(said.value)
    # Check the sums of members that the pickle does not refer to, too.
    for member in members.values():
        _content(archive, member)
    return value


def _members(
    archive: zipfile.ZipFile, size: int
) -> Dict[str, zipfile.ZipInfo]:
    """The archive's members, by their names inside its one folder.

    Args:
        archive: The archive.
        size: Largest number of bytes that it may unpack to.
    """
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
        raise DamagedValue('an archive that torch.save did not write')
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
    """Accept an archive without checksums, with a warning.

    ``torch.serialization.set_crc32_options(False)`` leaves all of them zero.
    """
    infos = archive.infolist()
    if any(info.CRC for info in infos):
        return
    warnings.warn(
        f'{archive.filename} was written without checksums, so damage to its '
        'numbers cannot be seen',
        stacklevel=2,
    )
    for info in infos:
        del info.CRC  # or zipfile would compare it


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytearray:
    """Read all bytes of a member; zipfile compares the sum at the end."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DamagedValue('a member that is compressed in an unknown way')
    content = bytearray(info.file_size)
    with archive.open(info) as member:
        _fill(member, content)
        if member.read(1):
            raise DamagedValue('a member that is larger than it says')
    return content


# The format before torch 1.6


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
        raise DamagedValue('numbers in another byte order')
    said = read_pickle(file, steps)
    keys = read_pickle(file, steps).value
    dtypes = {}
    for outside in said.outside:
        # A word, the type, the key, the device, the number of values; then a
        # view, in files of torch before 0.4.
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
        raise DamagedValue('more bytes after its end')
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


# Both formats


def _fill(file: Any, content: bytearray) -> None:
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
        # A byte other than 0 and 1 would be neither True nor False.
        return torch.frombuffer(content, dtype=torch.uint8) != 0
    return torch.frombuffer(content, dtype=dtype)


def _as_claimed(numbers: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    if numbers.dtype is not dtype or numbers.numel() != count:
        raise DamagedValue('a storage of another size or type than it says')
    return numbers
