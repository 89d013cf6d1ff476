# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train a classifier, a detector or a segmentor: tools/train.py CONFIG."""

from arguments import (
    Parser,
    add_config_arguments,
    add_launcher_arguments,
    add_training_arguments,
    run,
)
from arguments.paths import check_input


def parse_args():
    parser = Parser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='resume from this checkpoint; without a path, or with `auto`, '
        'from the newest checkpoint in the work folder that is whole',
    )
    parser.add_argument(
        '--repeatable',
        action='store_true',
        help='seed each step anew, so that a resumed training equals an '
        'uninterrupted one bit by bit; needs randomness.seed in the config',
    )
    parser.add_argument(
        '--no-validate',
        action='store_true',
        help='do not evaluate during training',
    )
    parser.add_argument(
        '--quiet',
        action='store_true',
        help='print what is trained and how far it is; the log of mmengine '
        'goes into the work folder only',
    )
    add_training_arguments(parser)
    add_launcher_arguments(parser)
    parser.checks.append(lambda args: check(parser, args))
    return parser.parse_args()


def check(parser, args):
    if args.resume != 'auto':
        check_input(parser, args.resume, 'checkpoint to resume from')


def main(args):
    from mmdbb.mm.engine.command import load_config
    from mmdbb.mm.engine.launch import train

    train(load_config(args), args)


if __name__ == '__main__':
    run(parse_args, main)
