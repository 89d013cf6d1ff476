# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write the demo's data sets: once, completely, and over nobody's files."""

import json
import os
from pathlib import Path
from typing import Callable, Optional, Union

from mmdbb.errors import UserError
from workshop.demo.layouts import LAYOUTS
from workshop.demo.scenes import SPLITS, Source

# Stands in a data set's folder and says that it is the demo's, and which.
MARKER = '.mmdbb-demo.json'
# Raised when the content of a file of the same name changes.
FORMAT = 1


def prepare(
    task: str,
    root: Union[str, Path] = 'data',
    seed: int = 0,
    train: Optional[int] = None,
    val: Optional[int] = None,
) -> Path:
    """Have the data set of a task on disk, and return its folder.

    A data set that is complete is left alone, an interrupted one is
    completed. A file that exists is never written again.

    Args:
        task: ``'classification'``, ``'detection'`` or ``'segmentation'``.
        root: The folder that gets the data set's folder.
        seed: Decides the split and the scenes.
        train: Images to train on; the layout's own number by default.
        val: Images to validate on, likewise.

    Raises:
        UserError: A package is missing, a number is out of range, or the
            folder holds something else.
    """
    layout = LAYOUTS[task]
    images = {}
    for split, asked in zip(SPLITS, (train, val)):
        images[split] = layout.images[split] if asked is None else asked
        if images[split] < 1:
            raise UserError(
                f'{split} images must be 1 or more, got {images[split]}'
            )
        most = layout.most.get(split)
        if most and (images[split] > most or images[split] % 10):
            raise UserError(
                f'{split} images of {layout.name} must be a '
                f'multiple of 10 up to {most}, '
                f'got {images[split]}'
            )
    folder = Path(root) / layout.name
    _claim(folder, dict(format=FORMAT, seed=seed, **images))
    source = Source(seed)
    for path, content in layout.files(source, images):
        try:
            write_once(folder / path, content)
        except OSError as error:  # a full disk, say
            raise UserError(
                f"cannot write '{folder / path}': {error}; the next call "
                'goes on from here'
            ) from None
    _remove_parts(folder)
    return folder


def _remove_parts(folder: Path) -> None:
    """Remove parts of files that processes left which were killed."""
    for part in folder.rglob('*.part'):
        process = part.name.split('.')[-2]
        if not process.isdecimal():
            continue  # not written here
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except PermissionError:
            pass  # somebody else's, at work


def _claim(folder: Path, what: dict) -> None:
    """Make ``folder`` the data set ``what``, or raise if it is another."""
    marker = folder / MARKER
    try:
        if marker.exists():
            found = json.loads(marker.read_text())
        elif folder.is_dir() and not any(folder.iterdir()):
            found = what
        elif folder.exists() or folder.is_symlink():
            raise UserError(
                f"'{folder}' exists and was not made by this "
                'tool; choose another --root'
            )
        else:
            found = what
        if found != what:
            raise UserError(
                f"'{folder}' holds another demo data set "
                f'({_listed(found)}; wanted {_listed(what)}); '
                'remove it or choose another --root'
            )
        write_once(marker, json.dumps(what).encode)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use '{folder}': {error}") from None


def write_once(path: Path, content: Callable[[], bytes]) -> None:
    """Write a file in one step, unless it exists."""
    if path.exists():
        return
    data = content()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _listed(what) -> str:
    if not isinstance(what, dict):
        return repr(what)
    return ', '.join(f'{key} {value}' for key, value in what.items())
