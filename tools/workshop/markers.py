# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Pages that a tool writes a part of, between two lines."""

from __future__ import annotations

from pathlib import Path

from mmdbb.errors import UserError


def put_between(text: str, begin: str, end: str, body: str, page: Path) -> str:
    """Replace what stands between two lines of a page.

    Args:
        text: The page's text.
        begin: The line before; it stands in the page once.
        end: The line after; so does it.
        body: What shall stand between them.
        page: Path of the page, for the message.

    Returns:
        str: The new text.

    Raises:
        UserError: If the page lacks a line.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f'{page} needs the lines {begin!r} and {end!r}')
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    return f'{head}{begin}\n\n{body}\n\n{end}{tail}'
