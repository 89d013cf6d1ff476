# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Checkpoint files: safe to read, and either written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

import torch
from torch import Tensor, nn

from mmdbb.checkpoint.safe_globals import allow_mmengine_checkpoints
from mmdbb.errors import UserError


def read_checkpoint(path: str) -> dict:
    """Read a checkpoint without running any code from it.

    Args:
        path: A file written by ``torch.save``: mmengine's form, or a bare
            state dict.

    Returns:
        dict: With at least ``state_dict`` (names to tensors on the CPU) and
        ``meta``.

    Raises:
        UserError: If there is no such file, it is not a checkpoint, is
            truncated, asks for types that are not allowed, or holds values
            that are not finite.
    """
    file = Path(path)
    if file.is_dir():
        raise UserError(f'checkpoint is a folder, not a file: {path}')
    if not file.is_file():
        raise UserError(f'checkpoint not found: {path}')
    if not file.stat().st_size:
        raise UserError(f'checkpoint is empty: {path}')
    # Again: onedl-mmengine takes the list back after each of its own loads.
    allow_mmengine_checkpoints()
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        # The unpickler fails in as many ways as a file can be damaged.
        reason = str(error) or type(error).__name__
        forbidden = re.search(r'(?:GLOBAL|Unsupported class) (\S+)', reason)
        if isinstance(error, pickle.UnpicklingError) and forbidden:
            raise UserError(
                f'cannot read {path}: it holds {forbidden[1]}, which is not '
                'allowed in a checkpoint'
            ) from error
        # torch advises to load it unsafely; that helps nobody here.
        if 'weights_only' in reason:
            reason = 'no pickle of tensors'
        raise UserError(
            f'{path} is not a checkpoint, or is truncated: '
            f'{reason.splitlines()[0]}'
        ) from error
    return in_mmengine_form(checkpoint, path)


def in_mmengine_form(checkpoint, path: str) -> dict:
    """Check what was read; see :func:`read_checkpoint` for what comes out.

    Args:
        checkpoint: Whatever the file holds.
        path: The file, for messages.

    Raises:
        UserError: If it is not a state dict, alone or with others in a dict,
            or has values that are not finite.
    """
    if not isinstance(checkpoint, dict):
        raise UserError(
            f'{path} holds a {type(checkpoint).__name__}, not a checkpoint'
        )
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    state = checkpoint['state_dict']
    if not isinstance(state, dict) or not state:
        raise UserError(f'{path} has no weights: its state_dict is empty')
    strange = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if strange:
        raise UserError(
            f'{path} is not a checkpoint: entry {strange[0]!r} is no tensor'
        )
    if all(name.startswith('module.') for name in state):
        state = {name[len('module.') :]: v for name, v in state.items()}
    bad = [
        name
        for name, value in state.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise UserError(f'{path} has values that are not finite: {some(bad)}')
    return dict(
        checkpoint, state_dict=state, meta=checkpoint.get('meta') or {}
    )


def load_strictly(
    model: nn.Module, state: Dict[str, Tensor], path: str
) -> None:
    """Load a state dict; every entry must fit and none may be missing.

    Args:
        model: The model to fill.
        state: Names to tensors.
        path: The file they come from, for the message.

    Raises:
        UserError: If names or shapes differ; the message shows some.
    """
    expected = model.state_dict()
    complaints = []
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    shapes = [
        f'{name} ({tuple(state[name].shape)} in the file, '
        f'{tuple(value.shape)} in the network)'
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing:
        complaints.append(f'missing: {some(missing)}')
    if extra:
        complaints.append(f'unexpected: {some(extra)}')
    if shapes:
        complaints.append(f'of another shape: {some(shapes)}')
    if complaints:
        raise UserError(
            f'{path} does not fit the network of the config; '
            f'{"; ".join(complaints)}'
        )
    model.load_state_dict(state)


def some(names: List[str], count: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    text = ', '.join(names[:count])
    if len(names) > count:
        text += f' and {len(names) - count} more'
    return text


@contextlib.contextmanager
def all_or_nothing(
    *outputs: str, overwrite: bool = False
) -> Iterator[List[str]]:
    """Write files so that they appear whole, at the end, or not at all.

    Args:
        outputs: The paths to write.
        overwrite: Whether existing files may be replaced.

    Yields:
        list: As many temporary paths, with the same file names, in a folder
        beside the outputs. They are moved into place if the block ends
        without an exception, and removed in any case.

    Raises:
        UserError: If an output exists and may not be replaced, or its folder
            cannot be written.
    """
    for output in outputs:
        if os.path.isdir(output):
            raise UserError(f'output is a folder: {output}')
        if not overwrite and os.path.lexists(output):
            raise UserError(
                f'output exists: {output}; choose another name or pass --force'
            )
    folder = os.path.dirname(os.path.abspath(outputs[0]))
    made = _missing_folders(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix='.mmdbb-', dir=folder)
    except OSError as error:
        _remove_empty(made)
        raise UserError(f'cannot write to {folder}: {error}') from error
    try:
        with temporary as scratch:
            drafts = [
                os.path.join(scratch, os.path.basename(o)) for o in outputs
            ]
            yield drafts
            _move_all(drafts, outputs, overwrite)
    except BaseException:
        _remove_empty(made)
        raise


def _move_all(
    drafts: Sequence[str], outputs: Sequence[str], overwrite: bool
) -> None:
    moved = []
    try:
        for draft, output in zip(drafts, outputs):
            if overwrite:
                os.replace(draft, output)
            else:
                _move_to_free_name(draft, output)
                moved.append(output)
    except BaseException:
        for output in moved:
            os.unlink(output)
        raise


def _missing_folders(folder: str) -> List[str]:
    """What has to be made for a folder to exist, the deepest first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _remove_empty(folders: Sequence[str]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # someone else's file is in it
            os.rmdir(folder)


def _move_to_free_name(draft: str, output: str) -> None:
    try:
        os.link(draft, output)  # fails, unlike a rename, if output exists
    except FileExistsError:
        raise UserError(f'output exists: {output}') from None
    except OSError:  # a file system without links
        os.rename(draft, output)
