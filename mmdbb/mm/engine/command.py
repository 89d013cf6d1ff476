# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The command-line tools' shared parts: arguments, configs, users' mistakes.

A user's mistake ends a command with one line on stderr and exit code 2. Ctrl-C
and SIGTERM end it with one line too, and with the exit codes that a shell
gives them (130 and 143). A bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Callable, Iterator, NoReturn, Optional, Tuple

from mmengine.config import Config, DictAction
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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` to stderr and exit with code 2."""
        self.exit(2, f'{self.prog}: {message} (see {self.prog} --help)\n')


class CfgOptions(DictAction):
    """`--cfg-options KEY=VALUE ...`; anything of another form is an error."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Merge `values` into the namespace."""
        for value in values:
            key, equals, _ = value.partition('=')
            if not equals or not all(key.split('.')):
                parser.error(
                    f'{option_string} takes KEY=VALUE with a dotted key, as '
                    f'in optim_wrapper.optimizer.lr=0.01; got {value!r}'
                )
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # brackets that do not match
            parser.error(f'{option_string}: {error}')


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
    if isinstance(error, (UserError, FileNotFoundError)):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return str(error)
    if isinstance(error, BAD_ARGUMENTS) and is_building(error):
        return (
            f'cannot build what the config says: {type(error).__name__}: '
            f'{error} (MMDBB_TRACEBACK=1 shows where)'
        )
    return None


def at_least_one(text: str) -> int:
    """Parse a count: the `type` of arguments such as `--calib`.

    Args:
        text: The argument as typed.

    Raises:
        argparse.ArgumentTypeError: If it is no whole number from 1 on.
    """
    return _number(int, text, 1, math.inf, 'a whole number from 1 on')


def at_least_zero(text: str) -> float:
    """Parse a limit or a factor: the `type` of `--wait-time` and others.

    Args:
        text: The argument as typed.

    Raises:
        argparse.ArgumentTypeError: If it is no finite number from 0 on.
    """
    return _number(float, text, 0, math.inf, 'a finite number from 0 on')


def seed(text: str) -> int:
    """Parse a seed, which NumPy's generators limit to 32 bits.

    Args:
        text: The argument as typed.

    Raises:
        argparse.ArgumentTypeError: If it is no whole number of 32 bits.
    """
    what = 'a whole number from 0 to 2**32 - 1'
    return _number(int, text, 0, 2**32, what)


def _number(kind: type, text: str, low: float, end: float, what: str):
    """Parse a number, and check that ``low <= number < end``."""
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not low <= number < end:
        raise argparse.ArgumentTypeError(f'must be {what}, got {text!r}')
    return number


def add_image_size_argument(
    parser: argparse.ArgumentParser,
    help: str,
    default: Optional[Tuple[int, int]] = None,
) -> None:
    """Add `--image-size HEIGHT WIDTH`, in pixels.

    Args:
        parser: The command's parser.
        help: The help text.
        default: Height and width if the option is not given.
    """
    parser.add_argument(
        '--image-size',
        nargs=2,
        type=at_least_one,
        default=default,
        metavar=('HEIGHT', 'WIDTH'),
        help=help,
    )


def add_image_choice_arguments(
    parser: argparse.ArgumentParser, calib: str
) -> None:
    """Add `--calib`, `--seed`, `--metric` and what it means.

    Args:
        parser: The command's parser.
        calib: Purpose of the images, to complete the help text
            "images ...", such as ``'to calibrate with'``.
    """
    parser.add_argument(
        '--calib',
        type=at_least_one,
        default=128,
        metavar='N',
        help=f'images {calib}; default: %(default)s',
    )
    parser.add_argument(
        '--metric',
        help="name of the evaluator's figure to report; default: its main one",
    )
    parser.add_argument(
        '--unit',
        choices=['share', 'points'],
        help='whether the evaluator prints this figure as a share of 1 or in '
        'points (per cent); needed for figures that mmdbb does not know',
    )
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument(
        '--lower-is-better',
        action='store_true',
        default=None,
        help='the figure is an error',
    )
    direction.add_argument(
        '--higher-is-better',
        action='store_false',
        dest='lower_is_better',
        default=None,
        help='the figure is no error; one of the two is needed for figures '
        'that mmdbb does not know',
    )
    parser.add_argument(
        '--seed',
        type=seed,
        default=0,
        help='random seed for the choice of images; default: 0',
    )


def add_config_arguments(
    parser: argparse.ArgumentParser, work_dir: bool = True
) -> None:
    """Add the arguments of every command that takes a config.

    Args:
        parser: The command's parser.
        work_dir: Whether the command writes logs or checkpoints, and so takes
            `--work-dir`.
    """
    parser.add_argument('config', help='path of the config')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='change fields of the config, e.g. train_cfg.max_epochs=10; '
        'lists as key="[a,b]" or key=a,b, without spaces',
    )
    if work_dir:
        parser.add_argument(
            '--work-dir',
            help='folder for logs and checkpoints; default: work_dir of the '
            'config, or work_dirs/NAME_OF_CONFIG',
        )


def add_unsafe_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--unsafe-load`, which reads checkpoints that hold code.

    Args:
        parser: The command's parser.
    """
    parser.add_argument(
        '--unsafe-load',
        action='store_true',
        help='read a checkpoint even if it holds more than data, and run the '
        'code in it; only for files that you trust',
    )


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--launcher`, the program that started the command's processes.

    Args:
        parser: The command's parser.
    """
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='the program that started the processes of a distributed run',
    )
    # Which spelling torch.distributed.launch passes depends on its version.
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments name, and apply `--cfg-options`.

    Sets `work_dir` and `launcher` where the command has these arguments.

    Args:
        args: Parsed arguments: those that :func:`add_config_arguments` adds,
            and for a distributed command those that
            :func:`add_launcher_arguments` adds.

    Raises:
        UserError: If the config is missing or cannot be read, one of its
            ``custom_imports`` fails, or a key of `--cfg-options` does not
            fit its fields.
    """
    path = check_file(args.config, 'config')
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
        config.merge_from_dict(args.cfg_options or {})
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
