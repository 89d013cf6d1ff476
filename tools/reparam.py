# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Turn a trained network with blocks into the stock network it equals.

  python tools/reparam.py CONFIG CHECKPOINT OUT.pth

writes the weights OUT.pth and the config OUT.py of the stock network, which
loads where mmdbb is not installed. The files are read again and compared with
the network they come from before they appear.
"""

from mmdbb.checkpoint.deploy import deploy_checkpoint
from mmdbb.engine.command import (
    Parser,
    add_config_arguments,
    load_config,
    run_command,
)


def parse_args():
    parser = Parser(description='Merge the blocks of a trained network')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='path of the trained checkpoint')
    parser.add_argument('out', help='checkpoint to write, *.pth')
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='fold the norms into the convolutions too; load the result with '
        'mmdbb.load_deployed, or see docs/deploy.md',
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
        default=1e-4,
        help='largest difference allowed, relative to the largest magnitude '
        'of an output; default: %(default)s',
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace OUT.pth and OUT.py if they exist',
    )
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
    )
    before, after = result.parameters
    difference = result.difference
    print(f'merged {result.blocks} blocks: {before:,} -> {after:,} parameters')
    print(
        f'largest difference: {difference.largest:.2e} of the largest '
        f'magnitude (in {difference.output or "none"}; compared '
        f'{len(difference.compared)} outputs, tolerance '
        f'{args.tolerance:.0e})'
    )
    print(f'weights: {result.checkpoint}')
    print(f'config:  {result.config}')


if __name__ == '__main__':
    run_command(main)
