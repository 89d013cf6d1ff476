# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Find the files that a config was made of: its own, its bases and others."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Iterator, List, Set

from mmengine.config import Config

from mmdbb.mm.host_internals import files_in_text, make_note, note_of

#: Sets that get the paths of opened files, one for each active context. They
#: are global because Python's audit hooks can never be removed.
_NOTING: List[Set[str]] = []
_NAME = '_files_read'


@contextlib.contextmanager
def noting_files() -> Iterator[Set[str]]:
    """Within the context, note the files that Python opens for reading.

    Yields:
        set: Their absolute paths. The set grows while the context is active.
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
    """Store in a config the files that it was made of.

    Args:
        cfg: The config.
        files: Absolute paths of the files.
    """
    make_note(cfg, _NAME, frozenset(files))


def files_of(cfg: Config) -> Set[str]:
    """The files that a config was made of, as far as they are known.

    Args:
        cfg: The config. For one from
            :func:`mmdbb.mm.engine.command.load_config` all files are known;
            for any other only its own file and the bases that it names in its
            text.

    Returns:
        set: Absolute paths of the files.
    """
    files = set(note_of(cfg, _NAME, ()))
    if cfg.filename:
        files.add(os.path.abspath(cfg.filename))
        files.update(files_in_text(cfg))
    return files


def imports_of(path: str) -> List[str]:
    """Modules that a config imports, which must be there to load it.

    Args:
        path: The config's file; nothing is imported.
    """
    config = Config.fromfile(path, import_custom_modules=False)
    imports = config.get('custom_imports', {}).get('imports', [])
    return [imports] if isinstance(imports, str) else list(imports)
