# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Arguments that several tools have."""

import argparse
from typing import Optional, Tuple

from arguments.numbers import at_least_one, seed
from arguments.parser import CfgOptions, Parser
from arguments.paths import check_input


def add_config_arguments(parser: Parser, work_dir: bool = True) -> None:
    """Add the arguments of every command that takes a config.

    Args:
        parser: The command's parser.
        work_dir: Whether the command writes logs or checkpoints, and so takes
            `--work-dir`.
    """
    parser.add_argument(
        'config',
        help='path of the config, or name of one in an installed package, '
        'such as mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    )
    parser.checks.append(
        lambda args: check_input(parser, args.config, 'config')
    )
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


def add_training_arguments(parser: Parser) -> None:
    """Add `--amp` and `--auto-scale-lr`, for every command that trains.

    Args:
        parser: The command's parser.
    """
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='multiply the learning rate by the total batch size, divided by '
        'auto_scale_lr.base_batch_size of the config',
    )


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
