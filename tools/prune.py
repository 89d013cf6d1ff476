# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Make a trained network smaller: merge, prune filters, fine-tune, export.

  python tools/prune.py CONFIG CHECKPOINT OUT.pth --ratio 0.3 --length 3

Pruning loses least after a training with KernelPenaltyHook, which shrinks
filters that the network can do without. tools/test.py evaluates the result,
and mmdbb.load_deployed loads it.
"""

from mmdbb.mm.engine.command import (
    Parser,
    add_config_arguments,
    add_image_choice_arguments,
    add_image_size_argument,
    at_least_one,
    at_least_zero,
    load_config,
    run_command,
)
from mmdbb.mm.pruning.pipeline import print_pruned
from mmdbb.prune import (
    Calibration,
    Metric,
    PruneOptions,
    Source,
    prune_checkpoint,
)


def parse_args():
    parser = Parser(description='Prune the filters of a trained network')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='path of the trained checkpoint')
    parser.add_argument('out', help='checkpoint to write, *.pth')
    parser.add_argument(
        '--ratio',
        type=float,
        default=0.3,
        help='share of the filters to remove; default: %(default)s',
    )
    parser.add_argument(
        '--each-layer',
        action='store_true',
        help='remove the same share of every layer; by default the shortest '
        'filters of all layers together are removed',
    )
    parser.add_argument(
        '--norm',
        type=int,
        choices=(1, 2),
        default=2,
        help="norm that measures a filter's length, L1 or L2; default: "
        '%(default)s',
    )
    parser.add_argument(
        '--round-to',
        type=at_least_one,
        metavar='N',
        help='leave each layer a multiple of N channels',
    )
    parser.add_argument(
        '--length',
        type=at_least_zero,
        default=0,
        metavar='N',
        help='fine-tune for N epochs, or N iterations if the config counts '
        "iterations; below 1, for this share of the config's schedule; "
        'default: no fine-tuning',
    )
    parser.add_argument(
        '--lr-scale',
        type=at_least_zero,
        default=0.1,
        help="learning rate of fine-tuning, as a share of the config's; "
        'default: %(default)s',
    )
    parser.add_argument(
        '--onnx', metavar='FILE.onnx', help='export the pruned network too'
    )
    add_image_choice_arguments(parser, 'for the running statistics of norms')
    add_image_size_argument(
        parser,
        "size of the images in pixels; default: the test set's first image",
    )
    parser.add_argument(
        '--force', action='store_true', help='replace existing outputs'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    options = PruneOptions(
        ratio=args.ratio,
        each_layer=args.each_layer,
        norm=args.norm,
        round_to=args.round_to,
        length=args.length,
        lr_scale=args.lr_scale,
        calibration=Calibration(args.calib, seed=args.seed),
    )
    result = prune_checkpoint(
        Source(load_config(args), args.checkpoint),
        args.out,
        options,
        onnx=args.onnx,
        image_size=tuple(args.image_size) if args.image_size else None,
        metric=Metric(args.metric, args.unit, args.lower_is_better),
        overwrite=args.force,
    )
    print_pruned(result)


if __name__ == '__main__':
    run_command(main)
