# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train small networks with each block and many seeds, and compare.

  python tools/study.py --out study.json --plot study.svg

Takes hours on a CPU core for everything. An interrupted study goes on where
it was; --minutes ends a run in time.
"""

from arguments import Parser, at_least_one, at_least_zero, run


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', required=True, help='JSON for the results')
    parser.add_argument('--plot', help='picture of the results')
    parser.add_argument(
        '--docs',
        action='store_true',
        help="write the tables of this checkout's docs/study.md too",
    )
    parser.add_argument(
        '--data',
        choices=['fashion_mnist'],
        default='fashion_mnist',
        help='the data set; default: %(default)s',
    )
    parser.add_argument(
        '--data-root',
        help='folder that has or gets the data set; default: '
        "data/fashion_mnist, and data for the demo's",
    )
    parser.add_argument('--networks', nargs='+', help='default: all')
    parser.add_argument(
        '--part',
        choices=[
            'blocks',
            'ablation',
            'transfer',
            'int8',
            'pruning',
            'drop',
            'tasks',
        ],
        default='blocks',
        help='what is compared: blocks; branches of DBB; starts from trained '
        'plain weights; networks after rounding to eight bits, with fewer '
        "filters, or without weak branches; the demo's detector and "
        'segmentor; default: %(default)s',
    )
    parser.add_argument(
        '--blocks', nargs='+', help='default: those of the part'
    )
    parser.add_argument(
        '--sizes',
        nargs='+',
        type=at_least_one,
        default=[30, 300, 3000],
        help='training images a class; default: 30 300 3000',
    )
    parser.add_argument(
        '--seeds',
        type=at_least_one,
        default=5,
        help='trainings of each block that are compared; default: %(default)s',
    )
    parser.add_argument(
        '--width',
        type=at_least_one,
        help='channels of the first stage; default: that of each network',
    )
    parser.add_argument(
        '--batch',
        type=at_least_one,
        help='images in a step; default: by the size',
    )
    parser.add_argument(
        '--epochs',
        type=at_least_one,
        help='passes over the images, which the search may double; default: '
        'by the size',
    )
    parser.add_argument(
        '--minutes',
        type=at_least_zero,
        default=float('inf'),
        help='start no training after this time; default: no limit',
    )
    parser.add_argument(
        '--jobs',
        type=at_least_one,
        default=1,
        help='networks that are trained at a time, in a process each; '
        'default: %(default)s',
    )
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--precision',
        choices=['float32', 'float16', 'bfloat16'],
        default='float32',
        help='autocast to this; default: %(default)s',
    )
    parser.add_argument(
        '--graphs',
        action='store_true',
        help='replay each step as a CUDA graph: the time of the GPU alone',
    )
    parser.add_argument(
        '--channels-last',
        action='store_true',
        help='keep kernels and maps in this memory format',
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace the picture; results are never replaced',
    )
    return parser.parse_args()


def main(args):
    from workshop.study.command import run_command

    run_command(args)


if __name__ == '__main__':
    run(parse_args, main)
