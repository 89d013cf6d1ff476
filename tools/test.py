# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Evaluate a classifier, detector or segmentor: tools/test.py CONFIG CKPT."""

from arguments import (
    Parser,
    add_checkpoint_argument,
    add_config_arguments,
    add_launcher_arguments,
    at_least_one,
    at_least_zero,
    run,
)


def parse_args():
    parser = Parser(description=__doc__)
    add_config_arguments(parser)
    add_checkpoint_argument(parser, 'path of the checkpoint')
    parser.add_argument(
        '--out', metavar='FILE.pkl', help='write the predictions to this file'
    )
    parser.add_argument(
        '--show', action='store_true', help='show predictions in a window'
    )
    parser.add_argument(
        '--show-dir', help='folder for images with predictions drawn on them'
    )
    parser.add_argument(
        '--interval',
        type=at_least_one,
        default=1,
        help='draw only every INTERVAL-th batch (classification: image); '
        'default: %(default)s',
    )
    parser.add_argument(
        '--wait-time',
        type=at_least_zero,
        default=2,
        help='seconds to show each image; default: %(default)s',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='average the predictions over test-time augmentation: by '
        "the config's tta_pipeline, or else by flipping",
    )
    parser.add_argument(
        '--quiet',
        action='store_true',
        help="print progress and the metrics; mmengine's log goes into "
        'the work folder only',
    )
    add_launcher_arguments(parser)
    parser.checks.insert(0, lambda args: check(parser, args))
    return parser.parse_args()


def check(parser, args):
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.refuse(
            f'--out takes a file that ends in .pkl or .pickle; got {args.out}'
        )


def main(args):
    from mmdbb.mm.engine.command import load_config
    from mmdbb.mm.engine.launch import test

    test(load_config(args), args)


if __name__ == '__main__':
    run(parse_args, main)
