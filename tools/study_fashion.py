# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train ResNet-18 plain, with DBB and with OREPA on all of Fashion-MNIST.

  python tools/study_fashion.py --device cuda --out fashion.json

Takes about ten minutes on one large GPU. An interrupted study goes on where
it stopped.
"""

from pathlib import Path

from arguments import Parser, at_least_one, at_least_zero, run


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', required=True, help='JSON for the results')
    parser.add_argument(
        '--blocks', nargs='+', help='default: plain, DBB and OREPA'
    )
    parser.add_argument(
        '--seeds',
        type=at_least_one,
        default=3,
        help='trainings of each block; default: %(default)s',
    )
    parser.add_argument(
        '--rates',
        nargs='+',
        type=at_least_zero,
        default=[0.05, 0.15, 0.45],
        help='learning rates that each block may choose from; default: '
        '0.05 0.15 0.45',
    )
    parser.add_argument(
        '--epochs',
        type=at_least_one,
        default=15,
        help='passes over the images; default: %(default)s',
    )
    parser.add_argument(
        '--search-epochs',
        type=at_least_one,
        default=5,
        help='passes of the trainings that choose the rate; default: '
        '%(default)s',
    )
    parser.add_argument(
        '--batch',
        type=at_least_one,
        default=512,
        help='images in a step; default: %(default)s',
    )
    parser.add_argument(
        '--width',
        type=at_least_one,
        default=64,
        help='channels of the first stage; default: %(default)s',
    )
    parser.add_argument(
        '--precision',
        choices=['float32', 'float16', 'bfloat16'],
        default='float16',
        help='autocast to this; default: %(default)s',
    )
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--graphs',
        action='store_true',
        help='replay each step as a CUDA graph: the time of the GPU alone',
    )
    parser.add_argument(
        '--jobs',
        type=at_least_one,
        default=1,
        help='processes that share the device while rates are chosen; '
        'default: %(default)s',
    )
    parser.add_argument(
        '--data-root',
        default='data/fashion_mnist',
        help='folder that has or gets the data set; default: %(default)s',
    )
    return parser.parse_args()


def main(args):
    import logging

    import torch
    from workshop.fashion.report import print_results
    from workshop.fashion.study import Plan, Recipe, read_results, run_study
    from workshop.fashion.training import BLOCKS

    plan = Plan(
        data_root=args.data_root,
        blocks=tuple(args.blocks or BLOCKS),
        rates=args.rates,
        seeds=args.seeds,
        recipe=Recipe(
            lr=0.0,
            epochs=args.epochs,
            batch=args.batch,
            precision=args.precision,
            width=args.width,
            captured=args.graphs,
        ),
        search_epochs=args.search_epochs,
        device=torch.device(args.device),
        jobs=args.jobs,
    )
    out = Path(args.out)
    logging.disable(logging.INFO)  # mmengine lists all weights at the start
    for result in run_study(plan, out):
        what = 'search' if result.searched else f'seed {result.seed}'
        print(
            f'{result.block}, {what}, rate {result.recipe.lr:g}: '
            f'{result.top1:.2f} %, {result.seconds:.1f} s',
            flush=True,
        )
    print_results(read_results(out))


if __name__ == '__main__':
    run(parse_args, main)
