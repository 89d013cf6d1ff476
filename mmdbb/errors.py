# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Errors that the user can put right, as opposed to bugs in mmdbb."""

import importlib
from typing import Optional


class UserError(Exception):
    """A mistake that the user can put right: in a path, a config or a file.

    The message is one line. It names the value given and the values allowed.
    """


class MissingFile(UserError, FileNotFoundError):
    """A file does not exist. ``except FileNotFoundError`` catches it too."""


class Terminated(KeyboardInterrupt):
    """``SIGTERM`` asked the process to end. Handled in the way of Ctrl-C."""


def interruption(error: BaseException) -> Optional[KeyboardInterrupt]:
    """Find the Ctrl-C behind an error.

    mmengine has bare ``except:`` clauses, which catch an interruption and
    raise another error for it.

    Args:
        error: The error to look behind.

    Returns:
        The interruption that led to it; None if there was none.
    """
    seen = set()
    found: Optional[BaseException] = error
    while found is not None and id(found) not in seen:
        if isinstance(found, KeyboardInterrupt):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


def require_packages(what: str, extra: str, *modules: str) -> None:
    """Raise early if a package is missing that only a part of mmdbb needs.

    Args:
        what: The part that needs the packages, for the message.
        extra: Name of the extra in ``setup.py`` that installs them.
        modules: Import names of the packages.

    Raises:
        UserError: If one cannot be imported. The message names it and says
            how to install it.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f'{what} needs {name} ({error}); in the checkout of mmdbb: '
                f'python -m pip install -e ".[{extra}]"'
            ) from error
