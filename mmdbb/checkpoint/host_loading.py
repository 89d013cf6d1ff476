# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmengine's readers of checkpoints, replaced by the one of mmdbb.

mmengine 0.10.7 leaves it to ``torch.load`` how a file is read: since torch
2.6 that refuses the files that mmengine writes itself, and before, as for all
that is downloaded, it runs what code is in them. With these, ``load_from``,
``resume``, testing and ``init_cfg`` read data and nothing else, whichever
tool starts them. ``torch.load`` itself stays as it is.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Iterator, Optional, Union
from urllib.parse import urlparse

import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as host
from torch import Tensor

from mmdbb.checkpoint.files import check_regular, read_content
from mmdbb.checkpoint.sources import AVERAGED, TRAINED, check_values
from mmdbb.checkpoint.values import Unread
from mmdbb.errors import UserError

Place = Union[str, torch.device, Callable, None]


def read_as_data() -> None:
    """Let mmengine read local and downloaded checkpoints by mmdbb.

    Calling it again changes nothing.
    """
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    # Used for http, https, torchvision, open-mmlab and mmcls.
    host.load_url = load_url


def load_from_local(filename: str, map_location: Place = None) -> dict:
    """Read a checkpoint, in the place of mmengine's function of that name.

    Args:
        filename: Path of the file, of any form that mmdbb reads.
        map_location: The device to put tensors on.

    Raises:
        UserError: If it is no checkpoint, is damaged, holds more than data,
            or has weights that no network has.
    """
    path = os.path.expanduser(filename)
    size = check_regular(path, 'checkpoint')
    content = read_content(path)
    if not isinstance(content, dict):
        raise UserError(
            f'{path} holds a {type(content).__name__}, not a checkpoint'
        )
    for state in _states(content, path):
        check_values(state, path, size)
    return _on(content, map_location)


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
    return load_from_local(path, map_location)


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


def _on(value: Any, place: Place) -> Any:
    """The value with its tensors on a device; callables choose the CPU."""
    if place is None:
        # torch's default is where a tensor was; that need not be here.
        place = 'cpu'
    if callable(place) or str(place) == 'cpu':
        return value
    if isinstance(value, Tensor):
        return value.to(place)
    if isinstance(value, dict):
        for key in value:
            value[key] = _on(value[key], place)
    elif isinstance(value, (list, tuple)):
        return type(value)(_on(item, place) for item in value)
    return value
