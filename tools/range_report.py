# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Predict what INT8 does to the merged kernels of a trained network.

python tools/range_report.py CONFIG CHECKPOINT [--plot ranges.png]
"""

from arguments import (
    Parser,
    add_checkpoint_argument,
    add_config_arguments,
    add_output_argument,
    run,
)


def parse_args():
    parser = Parser(
        description="Report the ranges of a network's merged kernels"
    )
    add_config_arguments(parser, work_dir=False)
    add_checkpoint_argument(parser)
    add_output_argument(
        parser,
        '--plot',
        'draw the ranges too, as *.png or *.svg',
        metavar='FILE',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace an existing FILE'
    )
    return parser.parse_args()


def main(args):
    from mmdbb.deploy import build_model
    from mmdbb.mm.engine.command import load_config
    from mmdbb.mm.engine.measure import check_picture, report_files
    from mmdbb.mm.quantization.network import load_network
    from mmdbb.mm.quantization.tables import plot_ranges, print_ranges
    from mmdbb.quantize import kernel_ranges

    check_picture(args.plot)
    with report_files(args.plot, overwrite=args.force) as (plot,):
        model = load_network(build_model(load_config(args)), args.checkpoint)
        ranges = kernel_ranges(model)
        print_ranges(ranges)
        if plot:
            plot_ranges(ranges, plot)
    if args.plot:
        print(f'plot: {args.plot}')


if __name__ == '__main__':
    run(parse_args, main)
