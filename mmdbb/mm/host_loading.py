# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Let mmengine read checkpoints with mmdbb's reader, which runs no code.

mmengine 0.10.7 reads files by ``torch.load`` with its default settings. Since
torch 2.6 these refuse the files that mmengine itself writes. Older versions of
torch run any code in a file; mmengine does the same with all files that it
downloads, on every torch. With the functions here, ``load_from``, ``resume``,
testing and ``init_cfg`` read data and nothing else, in mmdbb's tools and in
those of the OpenMMLab packages. ``torch.load`` itself stays as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from typing import Any, Callable, Dict, Iterator, Optional, Union
from urllib.parse import urlparse

import torch
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import check_regular, read_content
from mmdbb.files.sources import AVERAGED, TRAINED, check_values, shown
from mmdbb.files.values import Unread
from mmdbb.mm.host_internals import replace_readers

Place = Union[str, torch.device, dict, Callable, None]
#: Whether strict_loading() is active, as in all of mmdbb's own tools.
_STRICT = contextvars.ContextVar('strict', default=False)


def read_as_data() -> None:
    """Let mmengine read local and downloaded checkpoints with mmdbb's reader.

    Calling it again changes nothing.
    """
    replace_readers(load_for_mmengine, load_url)


def load_from_local(filename: str, map_location: Place = None) -> dict:
    """Read a checkpoint for mmdbb's own tools, and check its values.

    Args:
        filename: Path of the file: one that ``torch.save`` wrote, or a
            safetensors file.
        map_location: The device to put tensors on; None, a function or a dict
            leaves them on the CPU.

    Returns:
        dict: The content of the file.

    Raises:
        UserError: If the file is no checkpoint, is damaged, holds more than
            data, or has weights that no network can have, such as NaN or a
            negative variance.
    """
    path = os.path.expanduser(filename)
    size = check_regular(path, 'checkpoint')
    content = _dict_in(path)
    for state in _states(content, path):
        check_values(state, path, size)
    return _on(content, map_location)


def load_for_mmengine(filename: str, map_location: Place = None) -> dict:
    """Read a checkpoint; replaces mmengine's own ``load_from_local``.

    In other people's tools this function does not check the values, so that
    they get the same content as from torch: their buffers may be infinite,
    and an entry may be None or of a layer's own type. Within
    :func:`strict_loading` it calls :func:`load_from_local` instead.

    Args:
        filename: Path of the file: one that ``torch.save`` wrote, or a
            safetensors file.
        map_location: The device to put tensors on; None, a function or a dict
            leaves them on the CPU.

    Returns:
        dict: The content of the file.

    Raises:
        UserError: If the file is no checkpoint, is damaged, holds more than
            data, or has an entry among its weights that mmdbb cannot read.
    """
    if _STRICT.get():
        return load_from_local(filename, map_location)
    path = os.path.expanduser(filename)
    content = _dict_in(path)
    for key in ('state_dict', *AVERAGED):
        state = content.get(key, content if key == 'state_dict' else {})
        if key == 'state_dict' and not isinstance(state, dict):
            raise UserError(
                f'{path} is not a checkpoint: its {key} is a '
                f'{type(state).__name__}'
            )
        if isinstance(state, dict):
            _check_names(state, content, path)
    return _on(content, map_location)


def read_address(address: str) -> dict:
    """Read a checkpoint from an address that mmengine knows.

    Args:
        address: The address, such as ``torchvision://resnet50`` or
            ``https://...``.

    Returns:
        dict: The checkpoint, with tensors on the CPU.

    Raises:
        UserError: If the address has no checkpoint, or it cannot be read.
    """
    try:
        return CheckpointLoader.load_checkpoint(address, 'cpu')
    except KeyError as error:
        raise UserError(f'no such checkpoint: {address} ({error})') from error
    except OSError as error:
        raise UserError(f'cannot read {address}: {error}') from error


@contextlib.contextmanager
def strict_loading() -> Iterator[None]:
    """Within the context mmengine's loading checks values, too.

    Weights that no network can have, such as NaN, are then an error.
    """
    before = _STRICT.set(True)
    try:
        yield
    finally:
        _STRICT.reset(before)


def load_url(
    url: str,
    model_dir: Optional[str] = None,
    map_location: Place = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: Optional[str] = None,
) -> dict:
    """Download a checkpoint once, and read it; replaces torch's ``load_url``.

    Args:
        url: Address of the file.
        model_dir: Folder to keep the file in; by default the folder
            ``checkpoints`` of ``torch.hub``.
        map_location: The device to put tensors on; None, a function or a dict
            leaves them on the CPU.
        progress: Whether to show a progress bar.
        check_hash: Whether to compare the file's SHA-256 with the digits at
            the end of its name.
        file_name: Name of the file in the folder; by default its name in the
            address.

    Returns:
        dict: The content of the file.

    Raises:
        UserError: If the file is no checkpoint, is damaged, holds more than
            data, or has an entry among its weights that mmdbb cannot read.
    """
    folder = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    os.makedirs(folder, exist_ok=True)
    name = file_name or os.path.basename(urlparse(url).path)
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        found = torch.hub.HASH_REGEX.search(name) if check_hash else None
        torch.hub.download_url_to_file(
            url, path, found and found.group(1), progress=progress
        )
    return load_for_mmengine(path, map_location)


def _dict_in(path: str) -> dict:
    content = read_content(path)
    if not isinstance(content, dict):
        raise UserError(
            f'{path} holds a {type(content).__name__}, not a checkpoint'
        )
    return content


def _check_names(state: dict, content: dict, path: str) -> None:
    for name, value in state.items():
        if not isinstance(name, str):
            what = (
                'its keys are no names'
                if state is content
                else f'{shown(repr(name))} is no name of an entry'
            )
            raise UserError(f'{path} is not a checkpoint: {what}')
        if isinstance(value, Unread):
            raise UserError(
                f'{path} has entries that are {value.what}: {shown(name)}'
            )


def _states(content: dict, path: str) -> Iterator[dict]:
    """The state dicts in a checkpoint that may be loaded into a network."""
    if not all(isinstance(key, str) for key in content):
        raise UserError(f'{path} is not a checkpoint: its keys are no names')
    found = [key for key in (*TRAINED, *AVERAGED) if key in content]
    for key in found:
        if not isinstance(content[key], dict):
            raise UserError(
                f'{path} is not a checkpoint: its {key} is a '
                f'{type(content[key]).__name__}'
            )
        yield content[key]
    if not found and all(
        isinstance(value, (Tensor, Unread)) for value in content.values()
    ):
        yield content


def _on(content: dict, place: Place) -> dict:
    """Move the tensors of a checkpoint to a device, in place.

    Functions and dicts choose a device by the one that a tensor was saved
    from. This machine may not have that device, so they leave all tensors on
    the CPU.
    """
    if place is None or callable(place) or isinstance(place, dict):
        return content
    if str(place) == 'cpu':
        return content
    return _moved(content, place, {})


def _moved(value: Any, place: Place, moved: Dict[int, tuple]) -> Any:
    if isinstance(value, Tensor):
        # Entries that share a tensor go on to share it. The original is kept
        # too: once it is freed, another tensor could get its id.
        if id(value) not in moved:
            there = value.detach().to(place)
            if isinstance(value, nn.Parameter):
                there = nn.Parameter(there, value.requires_grad)
            moved[id(value)] = value, there
        return moved[id(value)][1]
    if isinstance(value, dict):
        for key in value:
            value[key] = _moved(value[key], place, moved)
    elif type(value) in (list, tuple):
        return type(value)(_moved(item, place, moved) for item in value)
    return value
