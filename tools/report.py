# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write a page on what the branches of a trained network did.

  python tools/report.py CONFIG CHECKPOINT OUT.html

writes one HTML file that needs nothing else: what each branch supplies of
the merged kernels, what is lost without it, the kernels as pictures, the risk
of INT8, sizes before and after, and the proof of the merge.
"""

import argparse

from arguments import (
    Parser,
    add_checkpoint_argument,
    add_config_arguments,
    add_image_size_argument,
    add_output_argument,
    add_unsafe_argument,
    at_least_one,
    run,
)
from arguments.paths import check_image


def parse_args():
    parser = Parser(
        description='Write a page on what the branches of a trained network '
        'did'
    )
    add_config_arguments(parser, work_dir=False)
    add_checkpoint_argument(parser)
    add_output_argument(
        parser, 'out', 'the page to write, *.html', suffixes=('.html', '.htm')
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '--images',
        nargs='+',
        default=[],
        metavar='FILE',
        help='images to measure changes of outputs on; by default two random '
        'ones',
    )
    which.add_argument(
        '--data',
        type=at_least_one,
        default=0,
        metavar='N',
        help="take N images from the config's test set instead",
    )
    add_image_size_argument(
        parser,
        'pixels of the images; default: 224 224, or with --data the size of '
        'the first image',
    )
    parser.add_argument(
        '--evaluate',
        action='store_true',
        help="run the config's evaluator too: on the merged network, and on "
        'it without each kind of branch',
    )
    parser.add_argument(
        '--metric',
        help="name of the evaluator's figure to report; default: its main one",
    )
    parser.add_argument(
        '--no-drop',
        dest='drop',
        action='store_false',
        help='do not run the network without each branch, which takes a '
        'forward pass for each',
    )
    parser.checks.append(
        lambda args: [check_image(parser, each) for each in args.images]
    )
    parser.add_argument('--title', default='', help='heading of the page')
    parser.add_argument(
        '--ema',
        action=argparse.BooleanOptionalAction,
        help='take the averaged weights, or the weights that are trained; '
        'default: the averaged ones if the checkpoint has any',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace an existing page'
    )
    add_unsafe_argument(parser)
    return parser.parse_args()


def main(args):
    from mmdbb.deploy import Source
    from mmdbb.mm.checkpoint_report import (
        CheckpointReportOptions,
        report_checkpoint,
    )
    from mmdbb.mm.engine.command import load_config
    from mmdbb.quantize import Metric
    from mmdbb.report import findings

    size = args.image_size
    options = CheckpointReportOptions(
        images=args.images,
        data=args.data,
        image_size=tuple(size) if size else None,
        evaluated=args.evaluate or args.metric is not None,
        metric=Metric(args.metric),
        drop=args.drop,
        title=args.title,
        progress=lambda text: print(f'{text} ...', flush=True),
    )
    source = Source(
        load_config(args), args.checkpoint, args.ema, args.unsafe_load
    )
    report = report_checkpoint(source, args.out, options, args.force)
    for finding in findings(report):
        print(f'{finding.kind}: {finding.text.replace("`", "")}')
    print(f'page: {args.out}')


if __name__ == '__main__':
    run(parse_args, main)
