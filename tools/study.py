# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train one small network with each block and many seeds, and compare.

  python tools/study.py --out study.json --plot study.svg

Takes some minutes on two CPU cores. An interrupted study is taken up
where it stopped.
"""

from pathlib import Path

from arguments import Parser, at_least_one, at_least_zero, run


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', required=True, help='JSON for the results')
    parser.add_argument('--plot', help='picture of the results')
    parser.add_argument(
        '--blocks', nargs='+', help='default: plain and all blocks'
    )
    parser.add_argument(
        '--seeds',
        type=at_least_one,
        default=10,
        help='trainings of each block; default: %(default)s',
    )
    parser.add_argument(
        '--images',
        type=at_least_one,
        default=30,
        help='training images a class; default: %(default)s',
    )
    parser.add_argument(
        '--epochs',
        type=at_least_one,
        default=40,
        help='passes over them; default: %(default)s',
    )
    parser.add_argument(
        '--batch',
        type=at_least_one,
        default=50,
        help='images in a step; default: %(default)s',
    )
    parser.add_argument(
        '--lr',
        type=at_least_zero,
        default=3e-3,
        help='learning rate; default: %(default)s',
    )
    parser.add_argument(
        '--data-root',
        default='data',
        help='folder that has or gets the data set; default: data',
    )
    parser.add_argument(
        '--threads',
        type=at_least_one,
        default=1,
        help='threads of torch; default: %(default)s',
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace files that exist; a study of the same settings is taken '
        'up all the same',
    )
    return parser.parse_args()


def main(args):
    import torch
    from workshop.demo import study

    from mmdbb.mm.engine.measure import check_picture, report_files

    budget = study.Budget(args.images, args.epochs, args.batch, args.lr)
    check_picture(args.plot)
    results = []
    with report_files(args.plot, overwrite=args.force) as (plot,):
        torch.set_num_threads(args.threads)
        for result in study.run_study(
            Path(__file__).resolve().parents[1],
            Path(args.out),
            budget,
            args.data_root,
            tuple(args.blocks or study.BLOCKS),
            args.seeds,
            overwrite=args.force,
        ):
            results.append(result)
            print(f'{result.block}, seed {result.seed}: {result.top1:.1f}')
        if plot:
            study.draw_study(results, plot)
    study.print_study(results)


if __name__ == '__main__':
    run(parse_args, main)
