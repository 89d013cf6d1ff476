# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmengine's readers of checkpoints, replaced by the one of mmdbb.

mmengine 0.10.7 leaves it to ``torch.load`` how a file is read: since torch
2.6 that refuses the files that mmengine writes itself, and before, as for all
that is downloaded, it runs what code is in them. With these, ``load_from``,
``resume``, testing and ``init_cfg`` read data and nothing else, whichever
tool starts them. ``torch.load`` itself stays as it is.
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
#: Whether one of mmdbb's own tools is at work.
_STRICT = contextvars.ContextVar('strict', default=False)


def read_as_data() -> None:
    """Let mmengine read local and downloaded checkpoints by mmdbb.

    Calling it again changes nothing.
    """
    replace_readers(load_for_mmengine, load_url)


def load_from_local(filename: str, map_location: Place = None) -> dict:
    """Read a checkpoint for mmdbb's own tools: no value may be strange.

    Args:
        filename: Path of the file, of any form that mmdbb reads.
        map_location: The device to put tensors on.

    Raises:
        UserError: If it is no checkpoint, is damaged, holds more than data,
            or has weights that no network has.
    """
    path = os.path.expanduser(filename)
    size = check_regular(path, 'checkpoint')
    content = _dict_in(path)
    for state in _states(content, path):
        check_values(state, path, size)
    return _on(content, map_location)


def load_for_mmengine(filename: str, map_location: Place = None) -> dict:
    """Read a checkpoint, in the place of mmengine's ``load_from_local``.

    Others' code gets what it would get from torch: buffers may be infinite,
    an entry None or of some layer's own form. Within :func:`strict_loading`
    it is :func:`load_from_local`.

    Args:
        filename: As there.
        map_location: As there.

    Raises:
        UserError: If it is no checkpoint, is damaged, holds more than data,
            or mmengine would load what was not read.
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
        address: Such as ``torchvision://resnet50`` or ``https://...``.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    try:
        return CheckpointLoader.load_checkpoint(address, 'cpu')
    except KeyError as error:
        raise UserError(f'no such checkpoint: {address} ({error})') from error
    except OSError as error:
        raise UserError(f'cannot read {address}: {error}') from error


@contextlib.contextmanager
def strict_loading() -> Iterator[None]:
    """Within the context mmengine gets no weights of strange values."""
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
    """Download a checkpoint once and read it, as torch's function of the name.

    Args:
        url: Where it is.
        model_dir: Folder to keep it in; torch's by default.
        map_location: The device to put tensors on.
        progress: Whether to show a bar.
        check_hash: Whether its name ends in the start of its SHA-256.
        file_name: What to call it, by default as in the address.

    Raises:
        UserError: As :func:`load_from_local`.
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
    """What mmengine, or a host, may load into a network."""
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
    """What was read with its tensors on a device.

    Callables and dicts, which go by where a tensor was, choose the CPU: that
    place need not be here.
    """
    if place is None or callable(place) or isinstance(place, dict):
        return content
    if str(place) == 'cpu':
        return content
    return _moved(content, place, {})


def _moved(value: Any, place: Place, moved: Dict[int, tuple]) -> Any:
    if isinstance(value, Tensor):
        # Entries that are one tensor stay one. What was moved is held too:
        # its identity must not become another's.
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
