# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Checkpoint files, read without running code from them."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
import zipfile
from typing import Dict, List, Optional

import torch
from torch import Tensor, nn

from mmdbb.errors import MissingFile, UserError
from mmdbb.files.atomic import all_or_nothing as all_or_nothing
from mmdbb.files.formats import (
    check_sum,
    is_safetensors,
    read_safetensors,
)
from mmdbb.files.sources import (
    check_values,
    choose_weights,
    shown,
    some,
)
from mmdbb.files.torch_files import read_torch
from mmdbb.files.values import NotAllowed

#: From here on ``weights_only=True`` runs no code (CVE-2025-32434).
_CAREFUL = '2.6'


def read_checkpoint(
    path: str, ema: Optional[bool] = None, unsafe: Optional[bool] = None
) -> dict:
    """Read a checkpoint without running any code from it.

    Args:
        path: A file written by ``torch.save``: mmengine's form, timm's or
            torchvision's, or a bare state dict; or a safetensors file.
        ema: True for averaged weights, False for those that training goes on
            with; None for the averaged ones if the file has any.
        unsafe: Whether to run what code the file holds, for a file that you
            trust as you trust a program. False if that was not asked for
            but could be; None if whoever calls has no such option.

    Returns:
        dict: With at least ``state_dict`` (names to tensors on the CPU),
        ``meta`` and ``weights`` (says which were taken).

    Raises:
        UserError: If there is no such file, it is not a checkpoint, is
            damaged, asks for types that are not allowed, has no weights of
            the kind asked for, or holds values that are not finite.
    """
    size = check_regular(path, 'checkpoint')
    return in_mmengine_form(read_content(path, unsafe), path, ema, size)


def check_regular(path: str, what: str) -> int:
    """The size in bytes of a regular file that is not empty.

    Args:
        path: Of any file. Pipes and devices may never end.
        what: What it should be, for messages.

    Raises:
        UserError: If there is none, or it is something else; if there is
            none, it is a FileNotFoundError too.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # a name with a NUL
        reason = getattr(error, 'strerror', None) or error
        if isinstance(error, FileNotFoundError):
            raise MissingFile(f'{what} not found: {path}') from error
        raise UserError(f'{what} not found: {path} ({reason})') from error
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f'{what} is a folder, not a file: {path}')
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f'{what} is a pipe or a device, not a file: {path}')
    if not found.st_size:
        raise UserError(f'{what} is empty: {path}')
    return found.st_size


def read_content(path: str, unsafe: Optional[bool] = None) -> object:
    """All that a checkpoint file holds, as data.

    Args:
        path: As of :func:`read_checkpoint`.
        unsafe: As there.

    Raises:
        UserError: If it is damaged, or holds more than data.
    """
    check_regular(path, 'checkpoint')
    if is_safetensors(path):
        content = read_safetensors(path)
    else:
        content = _read_torch(path, unsafe)
    check_sum(content, path)
    return content


def _read_torch(path: str, unsafe: Optional[bool]) -> object:
    try:
        if unsafe:
            return torch.load(path, map_location='cpu', weights_only=False)
        return read_torch(path)
    except NotAllowed as error:
        advice = (
            'save it again without that entry, by the program that wrote it'
            if unsafe is None
            else '--unsafe-load reads it, but runs any code in it: only for '
            'files that you trust'
        )
        raise UserError(
            f'cannot read {path}: it holds {error}, which is not '
            f'allowed in a checkpoint; {advice}'
        ) from error
    except Exception as error:
        # A file can be damaged in as many ways as there are to read it.
        reason = str(error) or type(error).__name__
        if not isinstance(error, ValueError):
            reason = f'{type(error).__name__}: {error}'
        raise UserError(
            f'{path} is not a checkpoint, or is truncated: '
            f'{shown(reason.splitlines()[0])}'
        ) from error


def in_mmengine_form(
    checkpoint,
    path: str,
    ema: Optional[bool] = None,
    size: float = float('inf'),
) -> dict:
    """Check what was read; see :func:`read_checkpoint` for what comes out.

    Args:
        checkpoint: Whatever the file holds.
        path: The file, for messages.
        ema: As of :func:`read_checkpoint`.
        size: Of the file, in bytes: no entry has more numbers.

    Raises:
        UserError: If it is not a state dict, alone or with others in a dict,
            or has values that are not finite.
    """
    if isinstance(checkpoint, nn.Module):  # read unsafely
        checkpoint = dict(state_dict=checkpoint.state_dict())
    if not isinstance(checkpoint, dict):
        raise UserError(
            f'{path} holds a {type(checkpoint).__name__}, not a checkpoint'
        )
    weights = choose_weights(checkpoint, path, ema)
    check_values(weights.state, path, size)
    meta = checkpoint.get('meta') if weights.key else None
    return dict(
        checkpoint if weights.key else {},
        state_dict=weights.state,
        meta=meta if isinstance(meta, dict) else {},
        weights=str(weights),
    )


def compare_with_torch(
    state: Dict[str, Tensor], path: str, ema: Optional[bool] = None
) -> bool:
    """Compare weights with what torch's own careful reader makes of a file.

    A second read by the same reader would make the same mistakes.

    Args:
        state: The weights, as :func:`read_checkpoint` took them.
        path: The file that they were read from.
        ema: As of :func:`read_checkpoint`.

    Returns:
        bool: Whether torch was asked: it refuses what mmengine writes beside
        weights, and before 2.6 can be made to run code.

    Raises:
        UserError: If a name, a type, a shape or a number differs.
    """
    if torch.__version__ < _CAREFUL or is_safetensors(path):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of old forms
            content = torch.load(
                path,
                map_location='cpu',
                weights_only=True,
                mmap=_can_be_mapped(path),
            )
    except Exception:  # of whatever kind: it says nothing about the weights
        return False
    theirs = choose_weights(content, path, ema).state
    different = [
        name
        for name in {**state, **theirs}
        if name not in state
        or name not in theirs
        or state[name].dtype is not theirs[name].dtype
        or not torch.equal(state[name], theirs[name])
    ]
    if different:
        raise UserError(
            f'{path} is read in two ways, by mmdbb and by torch, which differ '
            f'in {some(different)}; nothing written; please report it'
        )
    return True


def _can_be_mapped(path: str) -> bool:
    """Whether all numbers stand in the file as they are in memory."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(
            info.compress_type == zipfile.ZIP_STORED
            for info in archive.infolist()
        )


def describe_misfit(
    state: Dict[str, Tensor], expected: Dict[str, Tensor]
) -> str:
    """Say how two state dicts differ, by some of their entries.

    Args:
        state: That of a file.
        expected: That of the network.

    Returns:
        str: The differences in names, shapes and kinds of numbers; empty if
        there are none.
    """
    common = {n: v for n, v in expected.items() if n in state}
    shapes = [
        f'{name} ({tuple(state[name].shape)} in the file, '
        f'{tuple(value.shape)} in the network)'
        for name, value in common.items()
        if state[name].shape != value.shape
    ]
    types = [
        f'{name} ({_dtype(state[name])} in the file, {_dtype(value)} in the '
        'network)'
        for name, value in common.items()
        # A count may be a float: averaging makes it one.
        if value.is_floating_point() and not state[name].is_floating_point()
    ]
    theirs, ours = _parts(state), _parts(expected)
    others = [n for n in theirs if n not in ours]
    own = [n for n in ours if n not in theirs]
    parts = f'{some(others, 5)} in the file, {some(own, 5)} in the network'
    return '; '.join(
        f'{what}: {some(names)}'
        for what, names in (
            ('other parts', [parts] if others and own else []),
            ('missing', [n for n in expected if n not in state]),
            ('unexpected', [n for n in state if n not in expected]),
            ('of another shape', shapes),
            ('of another type', types),
        )
        if names
    )


def load_strictly(
    model: nn.Module,
    state: Dict[str, Tensor],
    path: str,
    keep_dtype: bool = False,
) -> None:
    """Load a state dict; every entry must fit and none may be missing.

    Args:
        model: The model to fill.
        state: Names to tensors.
        path: The file they come from, for the message.
        keep_dtype: Whether the model gets the tensors themselves, of
            whatever precision they are, instead of copies in its own.

    Raises:
        UserError: If names, shapes or kinds of numbers differ; the message
            shows some.
    """
    expected = model.state_dict()
    misfit = describe_misfit(state, expected)
    if misfit:
        raise UserError(
            f'{path} does not fit the network of the config; {misfit}'
        )
    if keep_dtype:
        state = {
            name: state[name]
            if value.is_floating_point()
            else state[name].to(value.dtype)
            for name, value in expected.items()
        }
    model.load_state_dict(state, assign=keep_dtype)


def _parts(state: Dict[str, Tensor]) -> List[str]:
    """What a network is made of: ``backbone``, ``neck``, ``head``."""
    return list(dict.fromkeys(n.split('.')[0] for n in state if '.' in n))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).rpartition('.')[2]


def sha256(path: str) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, 'rb') as file:
        for part in iter(lambda: file.read(1 << 20), b''):
            found.update(part)
    return found.hexdigest()
