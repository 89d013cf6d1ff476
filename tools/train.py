# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train a classifier, a detector or a segmentor: tools/train.py CONFIG."""

from mmdbb.mm.engine.command import (
    Parser,
    add_config_arguments,
    add_launcher_arguments,
    load_config,
    run_command,
)
from mmdbb.mm.engine.launch import train


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
        '--amp', action='store_true', help='train in mixed precision'
    )
    parser.add_argument(
        '--no-validate',
        action='store_true',
        help='do not evaluate during training',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='multiply the learning rate by the total batch size, divided by '
        'auto_scale_lr.base_batch_size of the config',
    )
    add_launcher_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    train(load_config(args), args)


if __name__ == '__main__':
    run_command(main)
