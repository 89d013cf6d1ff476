# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Mistakes of the user's, as opposed to mistakes of ours."""

import importlib
from typing import Optional


class UserError(Exception):
    """Something that the user can put right: a path, a config, a file.

    The message is one line that names what was given and what is allowed.
    """


class MissingFile(UserError, FileNotFoundError):
    """There is no such file, for those as well who expect Python's error."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end by ``SIGTERM``; as Ctrl-C otherwise."""


def interruption(error: BaseException) -> Optional[KeyboardInterrupt]:
    """The Ctrl-C that an error hides: mmengine has ``except:`` in places.

    Args:
        error: Any.

    Returns:
        The interruption that it was raised for; None if there was none.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def require_packages(what: str, extra: str, *modules: str) -> None:
    """Raise early if a package is missing that only a part of mmdbb needs.

    Args:
        what: Needs them.
        extra: Name of the extra that brings them.
        modules: What is imported.

    Raises:
        UserError: It names the package and how to install it.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f'{what} needs {name} ({error}); in the checkout of mmdbb: '
                f'pip install -e ".[{extra}]"'
            ) from error
