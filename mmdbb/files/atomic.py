# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write files so that they appear whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
from typing import (
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
)

from mmdbb.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

#: Start of the names of folders for files that are not yet whole.
SCRATCH = '.mmdbb-'
#: Stands for a lock where the file system has none.
NO_LOCKS = -1
#: Signals that wait while files are moved.
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
#: The disk or a quota is full, or a limit of the process is reached.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def all_or_nothing(
    *outputs: str, overwrite: bool = False
) -> Iterator[List[str]]:
    """Write files so that all of them appear whole at the end, or none does.

    Args:
        outputs: Paths of the files.
        overwrite: Whether existing files may be replaced.

    Yields:
        list: A temporary path for each output, with the same file name, in a
        folder beside the output. Write to these. If the ``with`` block ends
        without an exception, the files are moved into place. Temporary
        folders are removed in any case.

    Raises:
        UserError: If an output exists and may not be replaced, its folder
            cannot be written, or the disk is full.
    """
    for output in outputs:
        if os.path.isdir(output):
            raise UserError(f'output is a folder: {output}')
        if not overwrite and os.path.lexists(output):
            raise UserError(
                f'output exists: {output}; choose another name or pass --force'
            )
    places = [os.path.abspath(path) for path in outputs]
    if len(set(places)) < len(places):
        raise UserError(f'two outputs of one name: {", ".join(outputs)}')
    folders = [os.path.dirname(place) for place in places]
    for folder, output in zip(folders, outputs):
        if folder != folders[0] and not os.path.isdir(folder):
            raise UserError(f'no such folder: {folder}, for {output}')
    made = _missing_folders(folders[0])
    # Folder of outputs -> a temporary folder in it, so that both are on one
    # file system; and a lock, which tells others that we still work there.
    scratch: Dict[str, Tuple[str, int]] = {}
    done = False
    try:
        for folder in dict.fromkeys(folders):
            with uninterrupted():
                scratch[folder] = _scratch_folder(folder)
        drafts = [
            os.path.join(scratch[folder][0], os.path.basename(output))
            for folder, output in zip(folders, outputs)
        ]
        yield drafts
        for draft in drafts:
            # Some file systems report a full disk only here.
            with open(draft, 'rb+') as file:  # Windows syncs no other file
                os.fsync(file.fileno())
        with uninterrupted():
            _move_all(drafts, outputs, overwrite)
            done = True
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f'cannot write to {" or ".join(dict.fromkeys(folders))}: '
            f'{error.strerror}'
        ) from error
    finally:
        try:
            _clean(scratch.values(), [] if done else made)
        except KeyboardInterrupt:  # came before signals had to wait
            _clean(scratch.values(), [] if done else made)
            raise


def _clean(scratch: Iterable[Tuple[str, int]], made: Sequence[str]) -> None:
    with uninterrupted():
        for folder, lock in scratch:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # closed already
                os.close(lock)
        _remove_empty(made)


def _scratch_folder(folder: str) -> Tuple[str, int]:
    try:
        os.makedirs(folder, exist_ok=True)
        _remove_abandoned(folder)
        while True:
            scratch = tempfile.mkdtemp(prefix=SCRATCH, dir=folder)
            lock = _locked(scratch)
            if lock is not None:
                return scratch, lock
    except OSError as error:
        raise UserError(f'cannot write to {folder}: {error}') from error


def _remove_abandoned(folder: str) -> None:
    """Remove temporary folders of processes that were killed."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(SCRATCH) and os.path.isdir(path):
            lock = _locked(path)
            if lock not in (None, NO_LOCKS):
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked(folder: str) -> Optional[int]:
    """Lock a folder. The system unlocks it when the process ends.

    Returns:
        int: Open descriptor of the folder; None if another process has locked
        it, or it is gone; ``NO_LOCKS`` if the file system has no locks.
    """
    if fcntl is None:
        return NO_LOCKS
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have removed it before we locked it.
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        return NO_LOCKS
    os.close(descriptor)
    return None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the context, Ctrl-C and ``SIGTERM`` wait until it ends.

    Their handlers are replaced. Blocking the signals would not do, because a
    signal that is blocked in one thread is delivered to another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: Dict[int, Any] = {
        number: signal.getsignal(number) for number in INTERRUPTIONS
    }
    waiting: List[tuple] = []
    try:
        for number, before in handlers.items():
            # A signal without a Python handler ends the process or is
            # ignored; nothing can wait then.
            if callable(before):
                signal.signal(number, lambda *args: waiting.append(args))
        yield
    finally:
        for number, before in handlers.items():
            if callable(before):
                signal.signal(number, before)
        if waiting:
            number, frame = waiting[0]
            handlers[number](number, frame)


def _move_all(
    drafts: Sequence[str], outputs: Sequence[str], overwrite: bool
) -> None:
    """Move all files into place; if one fails, undo the others.

    Args:
        drafts: Temporary paths of the files.
        outputs: Their final paths.
        overwrite: Whether existing files may be replaced.
    """
    kept: List[Optional[str]] = []
    try:
        for draft, output in zip(drafts, outputs):
            # A short name, because the file's own may be as long as allowed.
            copy = os.path.join(os.path.dirname(draft), f'.{len(kept)}')
            kept.append(_kept(output, copy) if overwrite else None)
            if overwrite:
                os.replace(draft, output)
            else:
                _move_to_free_name(draft, output)
    except BaseException:
        for draft, output, old in zip(drafts, outputs, kept):
            if old is not None:
                os.replace(old, output)
            elif _is_moved(draft, output):
                os.unlink(output)
        raise


def _is_moved(draft: str, output: str) -> bool:
    """Whether an output is the file that we moved, not another process's."""
    if not os.path.lexists(output):
        return False
    return not os.path.exists(draft) or os.path.samefile(draft, output)


def _kept(path: str, copy: str) -> Optional[str]:
    """Keep a file under a second name, and return that.

    Args:
        path: The file.
        copy: The second name.

    Returns:
        str: The second name; None if the file does not exist.
    """
    if not os.path.lexists(path):
        return None
    try:
        os.link(path, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a system without such links
        shutil.copy2(path, copy, follow_symlinks=False)
    return copy


def _missing_folders(folder: str) -> List[str]:
    """List the folders that are missing up to a path, deepest first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _remove_empty(folders: Sequence[str]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: others use it
            os.rmdir(folder)


def _move_to_free_name(draft: str, output: str) -> None:
    try:
        os.link(draft, output)  # fails, unlike a rename, if output exists
    except FileExistsError:
        raise UserError(f'output exists: {output}') from None
    except OSError:  # a file system without links
        os.rename(draft, output)
