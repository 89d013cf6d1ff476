# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Turn a trained network with blocks into the stock network it equals.

  python tools/reparam.py CONFIG CHECKPOINT OUT.pth

writes the weights OUT.pth and the config OUT.py of the stock network, which
loads where mmdbb is not installed. The files are read again and compared with
the trained network before they appear. For other runtimes --format onnx,
torchscript and torch.export write OUT.onnx, OUT.pt and OUT.pt2.
"""

import argparse

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

#: Formats for runtimes -> their endings.
FORMATS = {'onnx': '.onnx', 'torchscript': '.pt', 'torch.export': '.pt2'}


def parse_args():
    parser = Parser(description='Merge the blocks of a trained network')
    add_config_arguments(parser, work_dir=False)
    add_checkpoint_argument(parser)
    add_output_argument(
        parser,
        'out',
        'file to write: *.pth or *.safetensors; with the formats onnx, '
        'torchscript and torch.export *.onnx, *.pt and *.pt2',
        suffixes=endings,
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        '--format',
        choices=['stock', 'fused', *FORMATS],
        default='stock',
        help='stock: the network that the OpenMMLab package builds; fused: '
        'norms folded into the convolutions too, to be loaded with '
        'mmdbb.load_deployed; the others: files for other runtimes, see '
        'docs/deploy_formats.md; default: %(default)s',
    )
    kind.add_argument(
        '--fuse',
        dest='format',
        action='store_const',
        const='fused',
        help='the same as --format fused',
    )
    head = parser.add_mutually_exclusive_group()
    head.add_argument(
        '--head',
        action='store_true',
        help="export the raw maps of a detector's dense head too, not only "
        'backbone and neck (for onnx, torchscript and torch.export)',
    )
    head.add_argument(
        '--boxes',
        dest='head',
        action='store_const',
        const='boxes',
        help='export a detector to its boxes, decoded and after the '
        'non-maximum suppression (for onnx)',
    )
    parser.add_argument(
        '--ema',
        action=argparse.BooleanOptionalAction,
        help='take the averaged weights, or the weights that are trained; '
        'default: the averaged ones if the checkpoint has any',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help='merge only the blocks whose whole names match a shell pattern, '
        'e.g. "backbone.layer1.*"',
    )
    parser.add_argument(
        '--skip',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help='do not merge the blocks whose whole names match a shell pattern',
    )
    parser.add_argument(
        '--also-own',
        action=argparse.BooleanOptionalAction,
        help="merge the network's own re-parameterizable blocks too, such as "
        "MobileOne's, by their own method; default: only if the network has "
        'no blocks of mmdbb',
    )
    parser.add_argument(
        '--dtype',
        choices=['float64', 'float32'],
        default='float64',
        help='precision to compose kernels in; the files keep the precision '
        'of the checkpoint; default: %(default)s',
    )
    parser.add_argument(
        '--images',
        nargs='+',
        default=[],
        help='images to compare the networks on, besides random ones',
    )
    add_image_size_argument(
        parser,
        'pixels of the images to compare on, and of those that an exported '
        'file takes; default: %(default)s',
        (224, 224),
    )
    parser.add_argument(
        '--tolerance',
        type=at_least_zero,
        help='largest difference allowed: for stock and fused a share of a '
        "channel's largest magnitude, 1e-9 by default; for the other formats "
        "a share of an output's, 1e-4 by default",
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace the output files if they exist',
    )
    add_unsafe_argument(parser)
    parser.checks.insert(0, lambda args: check(parser, args))
    return parser.parse_args()


def endings(args):
    suffix = FORMATS.get(args.format)
    return (suffix,) if suffix else ('.pth', '.safetensors')


def check(parser, args):
    option = '--boxes' if args.head == 'boxes' else '--head'
    if args.head and args.format not in FORMATS:
        parser.refuse(f'{option} is not for the format {args.format}')
    if args.head == 'boxes' and args.format != 'onnx':
        parser.refuse(f'--boxes is for the format onnx, not {args.format}')
    if args.format in FORMATS and (args.only or args.skip):
        parser.refuse(
            f'--only and --skip leave blocks, which the format {args.format} '
            'does not have'
        )
    for path in args.images:
        check_image(parser, path)


def main(args):
    from mmdbb.deploy import Proof, Source
    from mmdbb.mm.engine.command import load_config

    source = Source(
        load_config(args), args.checkpoint, args.ema, args.unsafe_load
    )
    proof = Proof(
        images=args.images,
        image_size=tuple(args.image_size),
        tolerance=args.tolerance,
    )
    if args.format in FORMATS:
        export(args, source, proof)
    else:
        deploy(args, source, proof)


def deploy(args, source, proof):
    import torch

    from mmdbb.deploy import MergeOptions, deploy_checkpoint

    options = MergeOptions(
        fuse=args.format == 'fused',
        only=args.only,
        skip=args.skip,
        dtype=getattr(torch, args.dtype),
        also_own=args.also_own,
    )
    result = deploy_checkpoint(
        source, args.out, options, proof, overwrite=args.force
    )
    before, after = result.parameters
    print(f'took the weights: {result.weights}')
    print(f'merged {result.blocks} blocks: {before:,} -> {after:,} parameters')
    if result.own:
        print(f"merged {len(result.own)} blocks of the network's own kind")
    if result.own_left:
        print(
            'the network has re-parameterizable blocks of its own kind; '
            '--also-own merges them too'
        )
    if result.left:
        print(f'{result.left} blocks are left: the result needs mmdbb')
    print_difference(result.difference, result.tolerance)
    if result.rounding is not None:
        print(
            'for comparison: float32 instead of float64 moves the '
            f"network's own outputs by up to {result.rounding:.2e}"
        )
    print(f'weights: {result.checkpoint}')
    print(f'config:  {result.config}')
    print_imports(result.config)


def print_imports(config):
    from mmdbb.mm.config_files import imports_of

    modules = imports_of(config)
    if modules:
        print(f'the config imports {", ".join(modules)}: loading needs it')


def export(args, source, proof):
    import torch

    from mmdbb.export import export_checkpoint
    from mmdbb.mm.export.formats import INPUT

    result = export_checkpoint(
        source,
        args.out,
        args.format,
        head=args.head,
        dtype=getattr(torch, args.dtype),
        proof=proof,
        overwrite=args.force,
        also_own=args.also_own,
    )
    notes = result.metadata
    print(f'took the weights: {notes["weights"]}')
    print(f'merged {notes["merged_blocks"]} blocks before the export')
    print_difference(result.difference, notes['tolerance'])
    print(f'input:   {INPUT} {tuple(notes["input"]["shape"])}')
    for name, shape in result.outputs.items():
        print(f'output:  {name} {("batch", *shape)}')
    print(f'{args.format}: {result.path}')


def print_difference(difference, tolerance):
    print(
        f'largest difference: {difference.largest:.2e} of the largest '
        f'magnitude (in {difference.output or "none"}; compared '
        f'{len(difference.compared)} outputs, tolerance {tolerance:.0e})'
    )
    for name, reason in difference.left_out.items():
        print(f'not compared: {name} ({reason})')


if __name__ == '__main__':
    run(parse_args, main)
