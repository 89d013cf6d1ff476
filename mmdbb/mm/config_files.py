# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which files a config is made of."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Iterator, List, Set

from mmengine.config import Config

from mmdbb.mm.host_internals import files_in_text, make_note, note_of

#: Lists to note the files in that are opened; Python's hooks stay for good.
_NOTING: List[Set[str]] = []
_NAME = '_files_read'


@contextlib.contextmanager
def noting_files() -> Iterator[Set[str]]:
    """Within the context, the files that Python opens to read are noted.

    Yields:
        set: Their paths, as far as there are any yet.
    """
    if _note not in _HOOKS:
        _HOOKS.append(_note)
        sys.addaudithook(_note)
    found: Set[str] = set()
    _NOTING.append(found)
    try:
        yield found
    finally:
        _NOTING.remove(found)


_HOOKS: list = []


def _note(event: str, arguments: tuple) -> None:
    if not _NOTING or event != 'open':
        return
    path, mode, flags = arguments
    writes = flags & (os.O_WRONLY | os.O_RDWR) if flags else 0
    if isinstance(path, (str, bytes)) and not writes:
        for found in _NOTING:
            found.add(os.path.abspath(os.fsdecode(path)))


def remember_files(cfg: Config, files: Set[str]) -> None:
    """Note in a config which files it was made of."""
    make_note(cfg, _NAME, frozenset(files))


def files_of(cfg: Config) -> Set[str]:
    """The files that a config was made of, as far as they are known.

    Args:
        cfg: From :func:`mmdbb.mm.engine.command.load_config`, which notes all
            of them; or from elsewhere: then its own file, and the bases that
            it names in its text.
    """
    files = set(note_of(cfg, _NAME, ()))
    if cfg.filename:
        files.add(os.path.abspath(cfg.filename))
        files.update(files_in_text(cfg))
    return files
