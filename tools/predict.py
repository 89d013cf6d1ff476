# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Predict one image, and draw the prediction on it.

  python tools/predict.py CONFIG CHECKPOINT IMAGE OUT.png

CHECKPOINT is a trained one, a deployed one with its config, or an ONNX file
from tools/reparam.py (of a detector, one with --boxes).
"""

from arguments import (
    Parser,
    add_checkpoint_argument,
    add_config_arguments,
    add_output_argument,
    add_unsafe_argument,
    from_zero_to_one,
    run,
)
from arguments.paths import check_image


def parse_args():
    parser = Parser(description='Predict one image')
    add_config_arguments(parser, work_dir=False)
    add_checkpoint_argument(
        parser, 'path of the checkpoint, or of an ONNX file'
    )
    parser.add_argument('image', help='path of the image')
    parser.checks.append(lambda args: check_image(parser, args.image))
    add_output_argument(
        parser,
        'out',
        'picture to write, *.png or *.jpg',
        suffixes=('.png', '.jpg', '.jpeg'),
        inputs=('config', 'checkpoint', 'image'),
        nargs='?',
    )
    parser.add_argument(
        '--min-score',
        type=from_zero_to_one,
        default=0.3,
        help='print and draw boxes from this score on; default: %(default)s',
    )
    parser.add_argument(
        '--device',
        default='cpu',
        help='where a network in PyTorch runs, such as cuda:0; default: '
        '%(default)s',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace an existing OUT'
    )
    add_unsafe_argument(parser)
    return parser.parse_args()


def main(args):
    from mmdbb.deploy import Source, predict
    from mmdbb.mm.engine.command import load_config
    from mmdbb.mm.inference.picture import described

    sample = predict(
        Source(load_config(args), args.checkpoint, unsafe=args.unsafe_load),
        args.image,
        args.out,
        min_score=args.min_score,
        device=args.device,
        overwrite=args.force,
    )
    for line in described(sample, args.min_score):
        print(line)
    if args.out:
        print(f'picture: {args.out}')


if __name__ == '__main__':
    run(parse_args, main)
