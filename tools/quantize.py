# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Turn a trained network into an INT8 ONNX file, and measure its accuracy.

  python tools/quantize.py CONFIG CHECKPOINT OUT.onnx --calib 128

merges the blocks, exports the network, calibrates it with images of the
config's data set, quantizes it, and evaluates each stage with the config's
evaluator. A checkpoint of quantization-aware training has its ranges already,
so nothing is calibrated. The file is written only if the metric falls by no
more than --max-drop.

  python tools/quantize.py CONFIG CHECKPOINT OUT.onnx --sensitivity FILE.json
  python tools/quantize.py CONFIG CHECKPOINT OUT.onnx --budget 0.5
  python tools/quantize.py CONFIG CHECKPOINT OUT.onnx --keep-float head

report how much each layer alone changes the outputs, keep as few layers in
float as hold the fall of the metric within a budget, or keep those named.

  python tools/quantize.py CONFIG CHECKPOINT OUT.pth --insert-bn

writes a checkpoint and a config for further training before that. In them
each block is one convolution followed by a batch norm, which at the start
leaves the outputs of the network unchanged.
"""

from arguments import (
    Parser,
    add_checkpoint_argument,
    add_config_arguments,
    add_image_choice_arguments,
    add_image_size_argument,
    add_output_argument,
    at_least_one,
    at_least_zero,
    run,
)

SPLITS = ('train', 'val', 'test')
METHODS = ('minmax', 'entropy', 'percentile')


def parse_args():
    parser = Parser(description='Quantize a trained network to INT8')
    add_config_arguments(parser, work_dir=False)
    add_checkpoint_argument(
        parser,
        'path of the trained checkpoint, or of the network as a float ONNX '
        'file',
    )
    add_output_argument(
        parser,
        'out',
        'file to write: *.onnx, or *.pth with --insert-bn',
        suffixes=endings,
    )
    add_image_choice_arguments(parser, 'to calibrate with')
    parser.add_argument(
        '--calib-split',
        choices=SPLITS,
        default='train',
        help='data set that these images come from; default: %(default)s',
    )
    parser.add_argument(
        '--method',
        choices=METHODS,
        default='minmax',
        help='how the range of activations is chosen (values outside are '
        'clipped); default: %(default)s',
    )
    parser.add_argument(
        '--per-tensor',
        action='store_true',
        help='use one scale for each weight tensor, not for each channel',
    )
    parser.add_argument(
        '--reduce-range',
        action='store_true',
        help='store weights in seven bits: eight-bit products saturate on x86 '
        'processors without VNNI',
    )
    parser.add_argument(
        '--op-types',
        nargs='+',
        metavar='OPERATOR',
        help='ONNX operators to quantize; default: all that ONNX Runtime can '
        'quantize, except norms',
    )
    add_image_size_argument(
        parser,
        'size in pixels of the images that the file takes; default: the '
        "smallest that holds all of the test set's images",
    )
    parser.add_argument(
        '--max-drop',
        type=at_least_zero,
        default=1.0,
        metavar='POINTS',
        help='largest fall of the metric that is accepted, in points '
        '(hundredths), or in per cent of its value if its unit is not known; '
        'default: 1',
    )
    add_output_argument(
        parser,
        '--sensitivity',
        metavar='FILE',
        help='first write how much the outputs change if one layer alone is '
        'quantized, as JSON, and print it',
    )
    parser.add_argument(
        '--sensitivity-images',
        type=at_least_one,
        default=32,
        metavar='N',
        help='how many of the --calib images this, and --budget, compare the '
        'outputs on; default: %(default)s',
    )
    parser.add_argument(
        '--keep-float',
        nargs='+',
        default=(),
        metavar='PATTERN',
        help='layers to leave in float, by their names or by those of modules '
        'that hold them, with * for any characters',
    )
    parser.add_argument(
        '--budget',
        type=at_least_zero,
        metavar='POINTS',
        help='leave as few layers in float as let the metric fall by this '
        'much, in the unit of --max-drop',
    )
    parser.add_argument(
        '--no-test', action='store_true', help='skip the evaluation'
    )
    parser.add_argument(
        '--insert-bn',
        action='store_true',
        help='write OUT.pth and OUT.py for further training, instead of an '
        'INT8 file',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace an existing OUT'
    )
    parser.checks.insert(0, lambda args: check(parser, args))
    return parser.parse_args()


def endings(args):
    return ('.pth', '.safetensors') if args.insert_bn else ('.onnx',)


def check(parser, args):
    if args.budget is None:
        return
    if args.no_test:
        parser.refuse('--budget needs the evaluation: omit --no-test')
    if args.budget > args.max_drop:
        parser.refuse(
            f'--budget {args.budget:g} allows more than --max-drop '
            f'{args.max_drop:g}'
        )


def main(args):
    from mmdbb.mm.engine.command import load_config
    from mmdbb.quantize import Calibration, Source

    source = Source(load_config(args), args.checkpoint)
    calibration = Calibration(args.calib, args.calib_split, args.seed)
    if args.insert_bn:
        insert_norms(args, source, calibration)
    else:
        quantize(args, source, calibration)


def quantize(args, source, calibration):
    from mmdbb.mm.quantization.tables import (
        print_quantized,
        print_sensitivity,
    )
    from mmdbb.quantize import (
        Metric,
        QuantizeOptions,
        quantize_checkpoint,
        report_sensitivity,
    )

    options = QuantizeOptions(
        calibration=calibration,
        method=args.method,
        per_channel=not args.per_tensor,
        reduce_range=args.reduce_range,
        op_types=args.op_types,
        keep_float=args.keep_float,
        budget=args.budget,
        probes=args.sensitivity_images,
    )
    size = tuple(args.image_size) if args.image_size else None
    if args.sensitivity:
        report = report_sensitivity(
            source, args.sensitivity, options, size, overwrite=args.force
        )
        print_sensitivity(report)
    result = quantize_checkpoint(
        source,
        args.out,
        options,
        image_size=size,
        metric=Metric(args.metric, args.unit, args.lower_is_better),
        max_drop=args.max_drop,
        evaluated=not args.no_test,
        overwrite=args.force,
    )
    print_quantized(result)


def insert_norms(args, source, calibration):
    from mmdbb.quantize import insert_bn_checkpoint

    inserted = insert_bn_checkpoint(
        source, args.out, calibration, overwrite=args.force
    )
    print(f'{inserted.blocks} blocks became a convolution and a norm')
    print(
        f'largest difference: {inserted.difference.largest:.2e} of the '
        f'largest magnitude (in {inserted.difference.output or "none"})'
    )
    print(f'weights: {inserted.checkpoint}')
    print(f'config:  {inserted.config}')


if __name__ == '__main__':
    run(parse_args, main)
