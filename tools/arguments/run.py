# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run a tool: its arguments first, then the imports, then its work."""

import argparse
import functools
import os
import sys
from typing import Callable


def run(
    parse_args: Callable[[], argparse.Namespace],
    main: Callable[[argparse.Namespace], None],
    hosts: bool = True,
) -> None:
    """Parse a tool's arguments, and run its `main` with them.

    Args:
        parse_args: Parses and checks the arguments.
        main: The tool. What it works with it imports itself.
        hosts: Whether it needs mmengine and mmcv; False for tools of plain
            PyTorch.
    """
    name = os.path.basename(sys.argv[0])
    args = parse_args()
    try:
        if not hosts:
            _run_without_hosts(functools.partial(main, args), name)
            return
        from mmdbb.mm.engine.command import run_command
    except KeyboardInterrupt:
        print(f'{name}: interrupted', file=sys.stderr)
        sys.exit(130)
    except ImportError as error:
        # mmdbb's own message says what is missing and how to install it.
        if type(error).__name__ == 'MissingHosts':
            text = str(error)
        elif error.name == 'mmdbb':
            text = (
                f'mmdbb is not installed in {sys.executable}; in its '
                'checkout: pip install . (docs/get_started.md)'
            )
        else:
            raise
        print(f'{name}: {text}', file=sys.stderr)
        sys.exit(2)
    run_command(functools.partial(main, args))


def _run_without_hosts(main: Callable[[], None], name: str) -> None:
    from mmdbb.errors import UserError

    try:
        main()
    except UserError as error:
        print(f'{name}: {error}', file=sys.stderr)
        sys.exit(2)
