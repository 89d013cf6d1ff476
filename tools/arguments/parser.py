# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A parser that ends with one line, and that checks what it has read."""

import argparse
from typing import Callable, List, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line.

    Attributes:
        checks: Functions that take the parsed arguments and refuse wrong
            ones by :meth:`refuse`. They run in their order, after all
            arguments are read.
    """

    def __init__(self, *args, **kwargs) -> None:
        self.checks: List[Callable[[argparse.Namespace], None]] = []
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print `message` to stderr and exit with code 2."""
        self.refuse(f'{message} (see {self.prog} --help)')

    def refuse(self, message: str) -> NoReturn:
        """Print `message` without a hint to stderr and exit with code 2."""
        self.exit(2, f'{self.prog}: {message}\n')

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Parse the arguments, and check them."""
        found = super().parse_args(args, namespace)
        for check in self.checks:
            check(found)
        return found


class CfgOptions(argparse.Action):
    """`--cfg-options KEY=VALUE ...`; anything of another form is an error.

    The values stay texts; ``load_config`` reads them as mmengine does.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        """Collect `values` in the namespace."""
        for value in values:
            key, equals, _ = value.partition('=')
            if not equals or not all(key.split('.')):
                parser.error(
                    f'{option_string} takes KEY=VALUE with a dotted key, as '
                    f'in optim_wrapper.optimizer.lr=0.01; got {value!r}'
                )
        before = getattr(namespace, self.dest) or []
        vars(namespace)[self.dest] = [*before, *values]
