# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Make a trained network smaller: merge, prune filters, fine-tune, export.

  python tools/prune.py CONFIG CHECKPOINT OUT.pth --ratio 0.3 --length 3

Pruning loses least after a training with KernelPenaltyHook, which shrinks
filters that the network can do without. tools/test.py evaluates the result,
and mmdbb.load_deployed loads it.
"""

from arguments import (
    Parser,
    add_checkpoint_argument,
    add_config_arguments,
    add_image_choice_arguments,
    add_image_size_argument,
    add_output_argument,
    add_training_arguments,
    at_least_one,
    at_least_zero,
    between_zero_and_one,
    run,
)


def parse_args():
    parser = Parser(description='Prune the filters of a trained network')
    add_config_arguments(parser)
    add_checkpoint_argument(parser)
    add_output_argument(
        parser,
        'out',
        'checkpoint to write, *.pth or *.safetensors',
        suffixes=('.pth', '.safetensors'),
    )
    parser.add_argument(
        '--ratio',
        type=between_zero_and_one,
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
    add_training_arguments(parser)
    parser.add_argument(
        '--verbose',
        action='store_true',
        help="print mmengine's log of the fine-tuning too, which otherwise "
        'goes into a file of the work folder',
    )
    add_output_argument(
        parser,
        '--onnx',
        'export the pruned network too',
        suffixes=('.onnx',),
        metavar='FILE.onnx',
    )
    add_image_choice_arguments(parser, 'for the running statistics of norms')
    add_image_size_argument(
        parser,
        'size of the images in pixels; default: the smallest that holds all '
        "of the test set's images",
    )
    parser.add_argument(
        '--force', action='store_true', help='replace existing outputs'
    )
    return parser.parse_args()


def main(args):
    from mmdbb.mm.engine.command import load_config
    from mmdbb.mm.pruning.pipeline import print_pruned
    from mmdbb.prune import (
        Calibration,
        Metric,
        PruneOptions,
        Source,
        prune_checkpoint,
    )

    options = PruneOptions(
        ratio=args.ratio,
        each_layer=args.each_layer,
        norm=args.norm,
        round_to=args.round_to,
        length=args.length,
        lr_scale=args.lr_scale,
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        verbose=args.verbose,
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
    run(parse_args, main)
