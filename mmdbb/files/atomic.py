# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Writing files so that they appear whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import tempfile
import threading
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from mmdbb.errors import UserError

#: How folders for files that are not yet whole are called.
SCRATCH = '.mmdbb-'
#: In the place of a lock.
NO_LOCKS = -1
#: What waits while files are moved.
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
#: The disk, a quota, a limit of the process.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def all_or_nothing(
    *outputs: str, overwrite: bool = False
) -> Iterator[List[str]]:
    """Write files so that they appear whole, at the end, or not at all.

    Args:
        outputs: The paths to write.
        overwrite: Whether existing files may be replaced.

    Yields:
        list: As many temporary paths, with the same file names, each in a
        folder beside its output. They are moved into place if the block ends
        without an exception, and removed in any case.

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
    # Folder -> one in it, on the same file system, and a lock that says that
    # this process is at work there.
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
            # A full disk may show only now.
            with open(draft, 'rb') as file:
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
        except KeyboardInterrupt:  # just before it had to wait
            _clean(scratch.values(), [] if done else made)
            raise


def _clean(scratch: Iterable[Tuple[str, int]], made: Sequence[str]) -> None:
    with uninterrupted():
        for folder, lock in scratch:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # cleaned already
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
    """Remove what processes left there that were killed at their work."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(SCRATCH) and os.path.isdir(path):
            lock = _locked(path)
            if lock not in (None, NO_LOCKS):
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked(folder: str) -> Optional[int]:
    """Lock a folder, which the system unlocks when the process ends.

    Returns:
        int: An open descriptor of it; None if it is locked, or gone;
        ``NO_LOCKS`` where the file system has none.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been removed in between.
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
    """Within the context Ctrl-C and ``SIGTERM`` wait.

    The handlers are replaced, because a signal that one thread blocks reaches
    another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {n: signal.getsignal(n) for n in INTERRUPTIONS}
    waiting: List[tuple] = []
    try:
        for number, before in handlers.items():
            # Without a handler of Python's it ends the process, or nothing.
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
    """Move each into its place; if one fails, all is as it was before."""
    kept: List[Optional[str]] = []
    try:
        for draft, output in zip(drafts, outputs):
            # Of a short name: the draft's may have no room for more.
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
    """Whether an output is ours, and not another process's file."""
    if not os.path.lexists(output):
        return False
    return not os.path.exists(draft) or os.path.samefile(draft, output)


def _kept(path: str, copy: str) -> Optional[str]:
    """Keep a file under a second name; None if there is no such file."""
    if not os.path.lexists(path):
        return None
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(path, copy, follow_symlinks=False)
    return copy


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
