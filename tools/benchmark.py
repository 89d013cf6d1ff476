# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Measure what blocks cost, against plain convolutions, in one run.

  python tools/benchmark.py --network resnet18 --batch 16

prints a table for each phase, and with --out writes it as JSON; --plot draws
how a block's time and memory grow with batch, width and resolution.

  python tools/benchmark.py --import

prints what `import mmdbb` takes beyond `import torch`.

  python tools/benchmark.py --kernels 7 13 31 --block DilatedReparamConv

measures large depthwise kernels beside plain ones.
"""

from arguments import (
    Parser,
    add_image_size_argument,
    add_output_argument,
    at_least_one,
    run,
)

NETWORKS = ('resnet18', 'resnet50', 'resnet101', 'mobilenet', 'repvgg-a0')
PHASES = ('train', 'frozen', 'eval', 'deploy', 'merge')
PRECISIONS = ('float32', 'bfloat16', 'float16')


def parse_args():
    parser = Parser(description='Measure what blocks cost')
    parser.add_argument(
        '--network',
        nargs='+',
        choices=NETWORKS,
        default=['resnet18'],
    )
    parser.add_argument(
        '--block', default='DBB', help='DBB (default), ACB, OREPA, ...'
    )
    parser.add_argument(
        '--phase',
        nargs='+',
        choices=PHASES,
        default=PHASES,
    )
    parser.add_argument(
        '--batch', type=at_least_one, default=16, help='images'
    )
    add_image_size_argument(parser, 'pixels', (224, 224))
    parser.add_argument(
        '--threads', type=at_least_one, help='threads of torch'
    )
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='float32',
        help='autocast to this; default: %(default)s',
    )
    parser.add_argument(
        '--sync',
        action='store_true',
        help='also a step with SyncBN, on two processes of the CPU',
    )
    parser.add_argument(
        '--compile', action='store_true', help='run under torch.compile'
    )
    parser.add_argument(
        '--graphs',
        action='store_true',
        help='replay each step as a CUDA graph: the time of the GPU alone',
    )
    parser.add_argument(
        '--repeats',
        type=at_least_one,
        default=5,
        help='times that each variant runs; default: %(default)s',
    )
    parser.add_argument(
        '--import',
        dest='imports',
        action='store_true',
        help='measure `import mmdbb` and nothing else',
    )
    parser.add_argument(
        '--kernels',
        nargs='+',
        type=at_least_one,
        metavar='SIZE',
        help='measure one depthwise block of each size and nothing else',
    )
    add_output_argument(
        parser, '--out', 'write the rows to this JSON file', inputs=()
    )
    add_output_argument(
        parser, '--plot', 'draw the growth of one block here', inputs=()
    )
    parser.add_argument(
        '--force', action='store_true', help='replace files that exist'
    )
    return parser.parse_args()


def main(args):
    from workshop.benchmark.report import (
        print_imports,
        print_kernels,
        write_report,
    )

    if args.imports:
        print_imports(args.repeats)
    elif args.kernels:
        print_kernels(args)
    else:
        write_report(args)


if __name__ == '__main__':
    run(parse_args, main)
