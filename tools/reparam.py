# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Turn a trained network with blocks into the stock network it equals.

  python tools/reparam.py CONFIG CHECKPOINT OUT.pth

writes the weights OUT.pth and the config OUT.py of the stock network, which
loads where mmdbb is not installed. The files are read again and compared with
the network they come from before they appear.
"""

import argparse

import torch

from mmdbb.checkpoint.deploy import deploy_checkpoint
from mmdbb.engine.command import (
    Parser,
    add_config_arguments,
    add_unsafe_argument,
    load_config,
    run_command,
)


def parse_args():
    parser = Parser(description='Merge the blocks of a trained network')
    add_config_arguments(parser, work_dir=False)
    parser.add_argument('checkpoint', help='path of the trained checkpoint')
    parser.add_argument(
        'out', help='checkpoint to write, *.pth or *.safetensors'
    )
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='fold the norms into the convolutions too; load the result with '
        'mmdbb.load_deployed, or see docs/deploy.md',
    )
    parser.add_argument(
        '--ema',
        action=argparse.BooleanOptionalAction,
        help='take the averaged weights, or those that training went on with; '
        'default: the averaged ones if the checkpoint has any',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help='merge only the blocks whose names fit, e.g. "backbone.layer1.*"',
    )
    parser.add_argument(
        '--skip',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help='leave the blocks whose names fit as they are',
    )
    parser.add_argument(
        '--dtype',
        choices=['float64', 'float32'],
        default='float64',
        help='what kernels are composed in; they are written in the precision '
        'of the checkpoint; default: %(default)s',
    )
    parser.add_argument(
        '--images',
        nargs='+',
        default=[],
        help='images to compare the networks on, besides random ones',
    )
    parser.add_argument(
        '--image-size',
        nargs=2,
        type=int,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
        help='pixels, for the comparison; default: %(default)s',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        help='largest difference allowed, relative to the largest magnitude '
        'of an output; default: 1e-4, of half precision 1e-2, of bfloat16 0.1',
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace OUT.pth and OUT.py if they exist',
    )
    add_unsafe_argument(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    result = deploy_checkpoint(
        load_config(args),
        args.checkpoint,
        args.out,
        fuse=args.fuse,
        images=args.images,
        image_size=tuple(args.image_size),
        tolerance=args.tolerance,
        overwrite=args.force,
        only=args.only,
        skip=args.skip,
        dtype=getattr(torch, args.dtype),
        ema=args.ema,
        unsafe=args.unsafe_load,
    )
    before, after = result.parameters
    difference = result.difference
    print(f'took the weights: {result.weights}')
    print(f'merged {result.blocks} blocks: {before:,} -> {after:,} parameters')
    if result.left:
        print(f'{result.left} blocks are left: the result needs mmdbb')
    print(
        f'largest difference: {difference.largest:.2e} of the largest '
        f'magnitude (in {difference.output or "none"}; compared '
        f'{len(difference.compared)} outputs, tolerance '
        f'{result.tolerance:.0e})'
    )
    print(f'weights: {result.checkpoint}')
    print(f'config:  {result.config}')


if __name__ == '__main__':
    run_command(main)
