# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Predict what INT8 does to the merged kernels of a trained network.

python tools/range_report.py CONFIG CHECKPOINT [--plot ranges.png]
"""

from mmdbb.deploy import build_model
from mmdbb.mm.engine.command import (
    Parser,
    add_config_arguments,
    load_config,
    run_command,
)
from mmdbb.mm.engine.measure import check_picture, report_files
from mmdbb.mm.quantization.network import load_network
from mmdbb.mm.quantization.tables import plot_ranges, print_ranges
from mmdbb.quantize import kernel_ranges


def parse_args():
    parser = Parser(
        description="Report the ranges of a network's merged kernels"
    )
    add_config_arguments(parser, work_dir=False)
    parser.add_argument('checkpoint', help='path of the trained checkpoint')
    parser.add_argument(
        '--plot', metavar='FILE', help='draw the ranges too, as *.png or *.svg'
    )
    parser.add_argument(
        '--force', action='store_true', help='replace an existing FILE'
    )
    return parser.parse_args()


def main():
    args = parse_args()
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
    run_command(main)
