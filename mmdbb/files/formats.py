# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The two formats of checkpoint files: torch's, and safetensors.

A safetensors file holds tensors and text, but no code. The ``meta`` of a
checkpoint stands in it as JSON. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Dict

import numpy as np
import torch
from torch import Tensor

from mmdbb.errors import UserError, require_packages
from mmdbb.files.atomic import uninterrupted

SAFETENSORS = '.safetensors'
SUFFIXES = ('.pth', SAFETENSORS)
#: Key for the JSON of ``meta`` in the metadata of a safetensors file.
META = 'meta'
#: Key of mmdbb's notes in ``meta``, and in these of the weights' checksum.
OWN = 'mmdbb'
SUM = 'weights_sha256'


def is_safetensors(path: str) -> bool:
    """Whether a file is in safetensors format, by its first bytes or name."""
    with open(path, 'rb') as file:
        start = file.read(9)
    if start[:2] == b'PK':
        return False
    # A safetensors file begins with the size of a JSON object and the object.
    size = int.from_bytes(start[:8], 'little')
    return path.endswith(SAFETENSORS) or (
        start[8:] == b'{' and 2 <= size <= os.path.getsize(path) - 8
    )


def read_safetensors(path: str) -> dict:
    """Read a safetensors file.

    Args:
        path: The file.

    Returns:
        dict: With ``state_dict`` (names -> tensors) and ``meta``.

    Raises:
        UserError: If the package is missing, or the file is damaged.
    """
    safetensors = _package(path)
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            text = (file.metadata() or {}).get(META, '{}')
    except Exception as error:
        # An error of safetensors, or of torch for a dtype that it lacks.
        reason = str(error) or type(error).__name__
        raise UserError(
            f'{path} is not a safetensors file, or is truncated: '
            f'{reason.splitlines()[0]}'
        ) from error
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):  # no JSON: another program's text
        meta = {}
    return dict(state_dict=state, meta=meta)


def write_checkpoint(path: str, state: Dict[str, Tensor], meta: dict) -> None:
    """Write a checkpoint in the format that its file name tells.

    Args:
        path: The file: safetensors format if the name ends so, else torch's.
        state: Names -> tensors.
        meta: Notes to store. Entries that are not plain data are left out.

    Raises:
        UserError: If the file cannot be written: the disk is full, or the
            package is missing.
    """
    meta = {key: value for key, value in meta.items() if _is_plain(value)}
    meta[OWN] = {**meta.get(OWN, {}), SUM: content_sum(state)}
    try:
        if path.endswith(SAFETENSORS):
            content = _as_safetensors(path, state, meta)
            with open(path, 'wb') as file:
                file.write(content)
        else:
            # Given a file of Python's, torch.save raises Python's error with
            # the reason. A signal inside torch's writer would abort the
            # process, so signals wait.
            with open(path, 'wb') as file, uninterrupted():
                torch.save(dict(state_dict=state, meta=meta), file)
    except (OSError, RuntimeError) as error:
        # When torch closes its file, a second error hides the first.
        hidden = _first_of(error)
        if not isinstance(hidden, Exception):  # Ctrl-C
            raise hidden from None
        reason = hidden.strerror if isinstance(hidden, OSError) else hidden
        raise UserError(
            f'cannot write {os.path.basename(path)}: {reason}'
        ) from error


def content_sum(state: Dict[str, Tensor]) -> str:
    """Compute the SHA-256 of weights: of names, dtypes, shapes and values.

    Args:
        state: Names -> tensors, in any order.
    """
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        head = f'{name!r} {value.dtype} {tuple(value.shape)}\n'
        found.update(head.encode('utf-8', 'backslashreplace'))
        # As bytes, because numpy has no bfloat16.
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_sum(content: object, path: str) -> None:
    """Compare weights with the checksum that mmdbb noted beside them.

    Args:
        content: Content of the file. Without such a note nothing is compared.
        path: The file, for the message.

    Raises:
        UserError: If the checksums differ.
    """
    meta = content.get('meta') if isinstance(content, dict) else None
    own = meta.get(OWN) if isinstance(meta, dict) else None
    noted = own.get(SUM) if isinstance(own, dict) else None
    if noted is None:
        return
    state: Any = content.get('state_dict')  # type: ignore[attr-defined]
    whole = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor)
        for name, value in state.items()
    )
    if not whole or content_sum(state) != noted:
        raise UserError(
            f'{path} is damaged: its weights are not those that were written '
            f'(their SHA-256 is not that in meta.{OWN}.{SUM})'
        )


def _first_of(error: BaseException) -> BaseException:
    while error.__context__ is not None:
        error = error.__context__
    return error


def _as_safetensors(path: str, state: Dict[str, Tensor], meta: dict) -> bytes:
    safetensors = _package(path)
    tensors, seen = {}, set()
    for name, value in state.items():
        # safetensors refuses tensors that share memory, as tied weights do.
        memory = value.untyped_storage().data_ptr()
        if memory in seen or not value.is_contiguous():
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(memory)
        tensors[name] = value.detach()
    text = json.dumps(meta, default=_as_json, skipkeys=True)
    return safetensors.torch.save(tensors, {'format': 'pt', META: text})


def _package(path: str) -> Any:
    require_packages(os.path.basename(path), 'formats', 'safetensors')
    import safetensors.torch

    return safetensors


def _is_plain(value: Any) -> bool:
    """Whether a value is plain data, which readers without code can read."""
    if isinstance(value, dict):
        return _is_plain([*value.keys(), *value.values()])
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind in 'biuf'
    if isinstance(value, Tensor):
        return (
            value.layout is torch.strided
            and value.device.type == 'cpu'
            and not (value.is_complex() or value.is_quantized)
            # Not a view that repeats one number by a stride of zero.
            and value.numel() <= value.untyped_storage().nbytes()
        )
    return value is None or isinstance(value, (str, int, float))


def _as_json(value: Any) -> Any:
    return value.tolist()  # numpy's and torch's
