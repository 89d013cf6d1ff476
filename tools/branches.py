# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Show what each branch adds to its merged kernel; drop those that add little.

  python tools/branches.py CONFIG CHECKPOINT
  python tools/branches.py CONFIG CHECKPOINT --drop 0.05 --out OUT.pth

The second line writes the weights OUT.pth and the config OUT.py of the network
without the branches whose share is 0.05 or less. What they add is folded into
the kxk branches, so that the network computes the same. Train on from there
with load_from, or merge as ever.
"""

from arguments import (
    Parser,
    add_checkpoint_argument,
    add_config_arguments,
    add_image_size_argument,
    add_output_argument,
    add_unsafe_argument,
    at_least_zero,
    run,
)
from arguments.paths import check_image


def parse_args():
    parser = Parser(description='What branches add to merged kernels')
    add_config_arguments(parser, work_dir=False)
    add_checkpoint_argument(parser)
    parser.add_argument(
        '--drop',
        type=at_least_zero,
        metavar='SHARE',
        help='drop the branches with this share of the merged kernel or less',
    )
    add_output_argument(
        parser,
        '--out',
        'file to write with --drop, *.pth or *.safetensors',
        suffixes=('.pth', '.safetensors'),
    )
    parser.add_argument(
        '--images',
        nargs='+',
        default=[],
        help='images to compare the networks on, besides random ones',
    )
    add_image_size_argument(
        parser,
        'pixels of the images to compare on; default: %(default)s',
        (224, 224),
    )
    parser.checks.append(
        lambda args: [check_image(parser, each) for each in args.images]
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace the output files if they exist',
    )
    add_unsafe_argument(parser)
    args = parser.parse_args()
    if (args.drop is None) != (args.out is None):
        parser.refuse('--drop SHARE and --out FILE go together')
    return args


def main(args):
    from mmdbb.deploy import (
        Proof,
        Source,
        branch_report,
        drop_branches_checkpoint,
    )
    from mmdbb.mm.deploy.drop import table
    from mmdbb.mm.engine.command import load_config

    source = Source(
        load_config(args), args.checkpoint, unsafe=args.unsafe_load
    )
    if args.out is None:
        print('\n'.join(table(branch_report(source))))
        return
    proof = Proof(images=args.images, image_size=tuple(args.image_size))
    result = drop_branches_checkpoint(
        source, args.out, args.drop, proof, overwrite=args.force
    )
    print('\n'.join(table(result.shares)))
    count = sum(map(len, result.dropped.values()))
    before, after = result.parameters
    print(f'dropped {count} branches of {len(result.dropped)} blocks')
    print(f'parameters: {before:,} -> {after:,}')
    print(f'largest difference: {result.difference.largest:.2e}')
    print(f'weights: {result.checkpoint}')
    print(f'config:  {result.config}')


if __name__ == '__main__':
    run(parse_args, main)
