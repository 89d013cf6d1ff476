# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The command-line tools' shared parts: configs, users' mistakes.

Their arguments are read in ``tools/arguments``, before anything is imported.
A user's mistake ends a command with one line on stderr and exit code 2. Ctrl-C
and SIGTERM end it with one line too, and with the exit codes that a shell
gives them (130 and 143). A bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence

from mmengine.config import Config, DictAction
from mmengine.hub import get_config
from mmengine.utils import import_modules_from_strings

from mmdbb.errors import Terminated, UserError, interruption
from mmdbb.files.checkpoints import check_regular
from mmdbb.mm.config_files import noting_files, remember_files
from mmdbb.mm.host_internals import is_building
from mmdbb.mm.host_loading import strict_loading

#: Errors that constructors raise for wrong arguments.
BAD_ARGUMENTS = (
    AssertionError,
    ImportError,
    KeyError,
    TypeError,
    ValueError,
)


def run_command(main: Callable[[], None]) -> None:
    """Run a tool's `main`; a user's mistake ends it with exit code 2.

    These count as a user's mistakes: a `UserError`, an error of the system
    that names a file (missing, not readable), and an error while a runner
    builds a part of the config.

    Args:
        main: The tool, without arguments.
    """
    # mmengine imports pkg_resources; users can do nothing about the warning.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    try:
        with _ended_by_exceptions(), strict_loading():
            main()
    except (KeyboardInterrupt, Exception) as error:
        interrupted = interruption(error)
        if interrupted is not None:
            by_signal = isinstance(interrupted, Terminated)
            what = 'terminated' if by_signal else 'interrupted'
            print(f'{Path(sys.argv[0]).name}: {what}', file=sys.stderr)
            number = signal.SIGTERM if by_signal else signal.SIGINT
            sys.exit(128 + number)
        text = _explained(error)
        if text is None or os.environ.get('MMDBB_TRACEBACK'):
            raise
        line = ' '.join(text.split())
        print(f'{Path(sys.argv[0]).name}: {line}', file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """Within the context SIGTERM raises an exception, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def end(number, frame):
        if os.getpid() != process:  # a forked child inherits the handler
            os._exit(128 + number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _explained(error: Exception) -> Optional[str]:
    """The message for a user's mistake; None if the error is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f'{error.strerror}: {error.filename}'
    if isinstance(error, FileNotFoundError):
        return str(error)
    if isinstance(error, BAD_ARGUMENTS) and is_building(error):
        return (
            f'cannot build what the config says: {type(error).__name__}: '
            f'{error} (MMDBB_TRACEBACK=1 shows where)'
        )
    return None


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments name, and apply `--cfg-options`.

    Sets `work_dir` and `launcher` where the command has these arguments.

    Args:
        args: Parsed arguments: ``config`` and ``cfg_options`` (a list of
            texts ``KEY=VALUE``, or None); ``work_dir`` if the command writes
            logs, ``launcher`` and ``local_rank`` if it is distributed.

    Raises:
        UserError: If the config is missing or cannot be read, one of its
            ``custom_imports`` fails, or `--cfg-options` cannot be read or
            do not fit its fields.
    """
    path = check_file(_in_package(args.config), 'config')
    try:
        with noting_files() as files:
            config = Config.fromfile(path, import_custom_modules=False)
    except Exception as error:  # a config is code: anything may be raised
        raise UserError(
            f'cannot read config {path}: {type(error).__name__}: {error}'
        ) from error
    remember_files(config, files)
    imports = config.get('custom_imports')
    if imports:
        try:
            import_modules_from_strings(**imports)
        except (ImportError, TypeError) as error:
            raise UserError(
                f'custom_imports of {path}: {error.__cause__ or error}'
            ) from error
    try:
        config.merge_from_dict(parsed_options(args.cfg_options or ()))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f'--cfg-options do not fit {path}: {error}') from error
    if 'work_dir' in args:
        config.work_dir = (
            args.work_dir
            or config.get('work_dir')
            or os.path.join('work_dirs', Path(path).stem)
        )
    if 'launcher' in args:
        config.launcher = args.launcher
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return config


def parsed_options(texts: Sequence[str]) -> Dict[str, Any]:
    """Read `--cfg-options` as mmengine does.

    Args:
        texts: Texts of the form ``KEY=VALUE``.

    Returns:
        dict: Dotted keys -> values.

    Raises:
        UserError: If brackets in a value do not match.
    """
    found = argparse.Namespace()
    try:
        DictAction([], 'options', nargs='+')(None, found, texts)
    except AssertionError as error:
        raise UserError(f'--cfg-options: {error}') from error
    return found.options


def _in_package(name: str) -> str:
    """The path of a config; ``package::path`` is one in a package."""
    if '::' not in name:
        return name
    package = name.partition('::')[0]
    if importlib.util.find_spec(package) is None:  # mmengine would install it
        raise UserError(f'no such config: {name} ({package} is not installed)')
    try:
        return get_config(name).filename
    except Exception as error:  # of packages and of files, of any type
        raise UserError(
            f'no such config: {name} ({type(error).__name__}: {error})'
        ) from error


def check_file(path: str, what: str) -> str:
    """Check that a path is a regular file, and return it.

    Addresses of other backends (`https://`, `torchvision://`) pass unchecked.

    Args:
        path: The path.
        what: What the file should be, such as ``'config'``, for messages.

    Raises:
        UserError: If there is no such file, or it is not a regular one.
    """
    if '://' in path:
        return path
    if not os.path.exists(path) or os.path.isdir(path):
        raise UserError(f'no such {what}: {path}')
    check_regular(path, what)
    return path
