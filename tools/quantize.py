# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Turn a trained network into an INT8 ONNX file, and say how good it is.

  python tools/quantize.py CONFIG CHECKPOINT OUT.onnx --calib 128

merges the blocks, exports, calibrates with the config's own data, quantizes,
and evaluates each stage by the config's own evaluator. A checkpoint of
quantization-aware training brings its ranges along. The file is written only
if the metric falls by no more than --max-drop.

  python tools/quantize.py CONFIG CHECKPOINT OUT.pth --insert-bn

writes a checkpoint and a config to train on before that: each block becomes
one convolution with a batch norm that at first changes nothing.
"""

from mmdbb.mm.engine.command import (
    Parser,
    add_config_arguments,
    add_image_choice_arguments,
    add_image_size_argument,
    at_least_zero,
    load_config,
    run_command,
)
from mmdbb.mm.evaluation.images import SPLITS
from mmdbb.mm.quantization.onnx_static import METHODS
from mmdbb.mm.quantization.tables import print_quantized
from mmdbb.quantize import (
    Calibration,
    QuantizeOptions,
    Source,
    insert_bn_checkpoint,
    quantize_checkpoint,
)


def parse_args():
    parser = Parser(description='Quantize a trained network to INT8')
    add_config_arguments(parser, work_dir=False)
    parser.add_argument(
        'checkpoint',
        help='path of the trained checkpoint, or of the network as ONNX',
    )
    parser.add_argument(
        'out', help='file to write: *.onnx, with --insert-bn *.pth'
    )
    add_image_choice_arguments(parser, 'to calibrate with')
    parser.add_argument(
        '--calib-split',
        choices=SPLITS,
        default='train',
        help='whose dataloader they come from; default: %(default)s',
    )
    parser.add_argument(
        '--method',
        choices=METHODS,
        default='minmax',
        help='where activations are cut off; default: %(default)s',
    )
    parser.add_argument(
        '--per-tensor',
        action='store_true',
        help='one scale a weight, not one a channel',
    )
    parser.add_argument(
        '--reduce-range',
        action='store_true',
        help='weights of seven bits, for x86 processors without VNNI',
    )
    parser.add_argument(
        '--op-types',
        nargs='+',
        metavar='OPERATOR',
        help='ONNX operators to quantize; default: all that can be',
    )
    add_image_size_argument(
        parser, 'pixels that the file takes; default: those of the test set'
    )
    parser.add_argument(
        '--max-drop',
        type=at_least_zero,
        default=1.0,
        metavar='POINTS',
        help='largest fall of the metric, in hundredths; default: 1',
    )
    parser.add_argument(
        '--no-test', action='store_true', help='evaluate nothing'
    )
    parser.add_argument(
        '--insert-bn',
        action='store_true',
        help='write OUT.pth and OUT.py to train on, instead of an INT8 file',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace OUT if it exists'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    source = Source(load_config(args), args.checkpoint)
    calibration = Calibration(args.calib, args.calib_split, args.seed)
    if args.insert_bn:
        inserted = insert_bn_checkpoint(
            source, args.out, calibration, overwrite=args.force
        )
        print(f'{inserted.blocks} blocks: a convolution and a norm each')
        print(
            f'largest difference: {inserted.difference.largest:.2e} of the '
            f'largest magnitude (in {inserted.difference.output or "none"})'
        )
        print(f'weights: {inserted.checkpoint}')
        print(f'config:  {inserted.config}')
        return
    options = QuantizeOptions(
        calibration=calibration,
        method=args.method,
        per_channel=not args.per_tensor,
        reduce_range=args.reduce_range,
        op_types=args.op_types,
    )
    result = quantize_checkpoint(
        source,
        args.out,
        options,
        image_size=tuple(args.image_size) if args.image_size else None,
        metric=args.metric,
        max_drop=args.max_drop,
        evaluated=not args.no_test,
        overwrite=args.force,
    )
    print_quantized(result)


if __name__ == '__main__':
    run_command(main)
