# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Read checkpoint files without running code from them, and load them."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from mmdbb.errors import MissingFile, UserError
from mmdbb.files.atomic import all_or_nothing as all_or_nothing
from mmdbb.files.formats import (
    check_sum,
    is_safetensors,
    read_safetensors,
)
from mmdbb.files.second_reader import read_by_torch
from mmdbb.files.sources import (
    check_values,
    choose_weights,
    shown,
    some,
    with_versions_of,
)
from mmdbb.files.torch_files import read_torch
from mmdbb.files.values import NotAllowed


def read_checkpoint(
    path: str, ema: Optional[bool] = None, unsafe: Optional[bool] = None
) -> dict:
    """Read a checkpoint without running any code from it.

    Args:
        path: A file that ``torch.save`` wrote (a checkpoint of mmengine, timm
            or torchvision, or a bare state dict), or a safetensors file.
        ema: True for the averaged weights, False for the weights that are
            trained; None for the averaged ones if the file has any.
        unsafe: Whether code in the file may run. True is for a file that you
            trust as you trust a program. False and None forbid it; with False
            the error message names the option that allows it, with None the
            caller has no such option.

    Returns:
        dict: The checkpoint, with at least ``state_dict`` (names -> tensors
        on the CPU), ``meta`` and ``weights`` (tells which weights were
        taken).

    Raises:
        UserError: If the file does not exist, is no checkpoint, is damaged,
            holds types that are not allowed, has no weights of the kind asked
            for, or holds values that are not finite.
    """
    size = check_regular(path, 'checkpoint')
    return in_mmengine_form(read_content(path, unsafe), path, ema, size)


def check_regular(path: str, what: str) -> int:
    """Check that a path is a regular file and not empty; return its bytes.

    Pipes and devices are refused, because reading them may never end.

    Args:
        path: The path.
        what: What the file should be, such as ``'checkpoint'``, for messages.

    Raises:
        MissingFile: If it does not exist.
        UserError: If it is a folder, a pipe or a device, or empty.
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
    """Read all of a checkpoint file, in whatever form it stands there.

    Args:
        path: A file that ``torch.save`` wrote, or a safetensors file.
        unsafe: Whether code in the file may run, see
            :func:`read_checkpoint`.

    Raises:
        UserError: If the file is damaged, or holds more than data.
    """
    check_regular(path, 'checkpoint')
    content: Any
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
        # A damaged file can make the reader fail with any error.
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
    """Check the content of a file, and bring it into mmengine's form.

    Args:
        checkpoint: Content of the file.
        path: The file, for messages.
        ema: True for the averaged weights, False for the weights that are
            trained; None for the averaged ones if the file has any.
        size: Size of the file in bytes. No entry may have more numbers.

    Returns:
        dict: The checkpoint, with ``state_dict``, ``meta`` and ``weights``,
        see :func:`read_checkpoint`.

    Raises:
        UserError: If there is no state dict in it, or it has values that are
            not finite.
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
) -> None:
    """Read a file with torch too, and compare the weights.

    A second read by mmdbb's reader would repeat its mistakes, if it has any.

    Args:
        state: The weights, as :func:`read_checkpoint` returned them.
        path: The file that they were read from. Those of safetensors are read
            by their own library the first time, so they are not read again.
        ema: True for the averaged weights, False for the weights that are
            trained; None for the averaged ones if the file has any.

    Raises:
        UserError: If torch cannot read the file, or a name, a type, a shape
            or a number differs.
    """
    if is_safetensors(path):
        return
    try:
        theirs = choose_weights(read_by_torch(path), path, ema).state
    except Exception as error:  # a reader may fail in any way
        raise UserError(
            f'{path} is read by mmdbb, but not by torch '
            f'({type(error).__name__}: {error}); nothing written; please '
            'report it'
        ) from error
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


def describe_misfit(
    state: Dict[str, Tensor], expected: Dict[str, Tensor]
) -> str:
    """Describe how a file's state dict differs from a network's.

    Args:
        state: The state dict of the file.
        expected: The state dict of the network.

    Returns:
        str: Differences in names, shapes and kinds of numbers, with some of
        the entries; empty if there are none.
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
        # Averaging turns counts into floats, so those are allowed.
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
    """Load a state dict of which every entry must fit, and none be missing.

    Args:
        model: The model to fill.
        state: Names -> tensors.
        path: The file that they come from, for the message.
        keep_dtype: Whether the model takes over the tensors with their
            precision, instead of copying them into its own.

    Raises:
        UserError: If names, shapes or kinds of numbers differ; the message
            names some.
    """
    expected = model.state_dict()
    misfit = describe_misfit(state, expected)
    if misfit:
        raise UserError(
            f'{path} does not fit the network of the config; {misfit}'
        )
    if keep_dtype:
        state = with_versions_of(
            state,
            {
                name: state[name]
                if value.is_floating_point()
                else state[name].to(value.dtype)
                for name, value in expected.items()
            },
        )
    model.load_state_dict(state, assign=keep_dtype)


def refuse_untied(
    model: nn.Module, state: Dict[str, Tensor], path: str
) -> None:
    """Raise if layers share a tensor for which the file has several values.

    Whoever loads the file would get the last one in all of these layers.

    Args:
        model: The model that the file is for.
        state: The file's entries, which fit the model.
        path: The file, for the message.

    Raises:
        UserError: If there is such a tensor.
    """
    first: Dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        other = first.setdefault(tensor, name)
        if other != name and not torch.equal(state[name], state[other]):
            raise UserError(
                f'{path}: {other} and {name} are one tensor in the network of '
                'the config, but the trained network has two different '
                'kernels there; train with these layers plain (skip=)'
            )


def _parts(state: Dict[str, Tensor]) -> List[str]:
    """Names of a network's parts, such as ``backbone``, ``neck``, ``head``."""
    return list(dict.fromkeys(n.split('.')[0] for n in state if '.' in n))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).rpartition('.')[2]


def sha256(path: str) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, 'rb') as file:
        for part in iter(lambda: file.read(1 << 20), b''):
            found.update(part)
    return found.hexdigest()
