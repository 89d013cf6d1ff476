# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Paths in arguments: inputs that must exist, outputs that must not.

The checks here look at names only and are there to answer at once. What a
file is, and whether it can be written, is checked again by those who read and
write it.
"""

import argparse
import os
from typing import Callable, Optional, Sequence, Union

from arguments.parser import Parser

Suffixes = Union[Sequence[str], Callable[[argparse.Namespace], Sequence[str]]]


def check_input(parser: Parser, path: Optional[str], what: str) -> None:
    """Refuse an input that does not exist.

    Addresses (`https://...`) pass, and so do names of configs in installed
    packages (`mmdet::...`).

    Args:
        parser: The command's parser.
        path: The path; None passes.
        what: What the file should be, such as ``'config'``, for messages.
    """
    if path is None or '://' in path:
        return
    if what == 'config' and '::' in path:
        return
    if not os.path.exists(path) or os.path.isdir(path):
        parser.refuse(f'no such {what}: {path}')


def check_image(parser: Parser, path: str) -> None:
    """Refuse an image that does not exist, or is none of this machine.

    Args:
        parser: The command's parser.
        path: The path.
    """
    if '://' in path:
        parser.refuse(f'images must be files of this machine, got {path}')
    check_input(parser, path, 'image')


def add_checkpoint_argument(
    parser: Parser, help: str = 'path of the trained checkpoint'
) -> None:
    """Add the argument `checkpoint`, a file that exists.

    Args:
        parser: The command's parser.
        help: The help text.
    """
    parser.add_argument('checkpoint', help=help)
    parser.checks.append(
        lambda args: check_input(parser, args.checkpoint, 'checkpoint')
    )


def add_output_argument(
    parser: Parser,
    name: str,
    help: str,
    suffixes: Suffixes = (),
    inputs: Sequence[str] = ('config', 'checkpoint'),
    metavar: Optional[str] = None,
    nargs: Optional[str] = None,
) -> None:
    """Add an output, which must not exist without `--force`.

    Args:
        parser: The command's parser.
        name: Name of the argument.
        help: The help text.
        suffixes: Endings that its name may have, or a function from the
            parsed arguments to them; empty for any.
        inputs: Names of arguments that are inputs. The output must be none
            of them, with `--force` neither.
        metavar: Its name in the help.
        nargs: ``'?'`` if it may be left out.
    """
    options = {} if nargs is None else dict(nargs=nargs)
    parser.add_argument(name, help=help, metavar=metavar, **options)
    dest = name.lstrip('-').replace('-', '_')

    def check(args: argparse.Namespace) -> None:
        out = getattr(args, dest)
        if out is None:
            return
        allowed = suffixes(args) if callable(suffixes) else suffixes
        if allowed and not out.endswith(tuple(allowed)):
            parser.refuse(
                f'the output must end in {" or ".join(allowed)}, got {out}'
            )
        for each in inputs:
            path = getattr(args, each, None)
            if path and os.path.realpath(path) == os.path.realpath(out):
                parser.refuse(f'output {out} is also an input')
        if os.path.isdir(out):
            parser.refuse(f'output is a folder: {out}')
        if os.path.lexists(out) and not args.force:
            parser.refuse(
                f'output exists: {out}; choose another name or pass --force'
            )

    parser.checks.append(check)
