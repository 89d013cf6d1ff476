# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train small networks with each block and many seeds, and compare.

  python tools/study.py --out study.json --plot study.svg

Takes hours on a CPU core for everything. An interrupted study goes on where
it was; --minutes ends a run in time.
"""

from pathlib import Path

from arguments import Parser, at_least_one, at_least_zero, run

HOME = Path(__file__).resolve().parents[1]


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', required=True, help='JSON for the results')
    parser.add_argument('--plot', help='picture of the results')
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
            'tasks',
        ],
        default='blocks',
        help='what is compared: blocks; branches of DBB; starts from trained '
        'plain weights; networks after rounding to eight bits, or with fewer '
        "filters; the demo's detector and segmentor; default: %(default)s",
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
        '--force',
        action='store_true',
        help='replace the picture; results are never replaced',
    )
    return parser.parse_args()


def main(args):
    import logging

    import torch
    from workshop.study.picture import draw_study
    from workshop.study.report import print_follow_ups, print_study
    from workshop.study.rows import read_record

    from mmdbb.mm.engine.measure import check_picture, report_files

    check_picture(args.plot)
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # mmengine lists all weights at the start
    out = Path(args.out)
    with report_files(args.plot, overwrite=args.force) as (plot,):
        study = (
            _tasks(args, out) if args.part == 'tasks' else _fashion(args, out)
        )
        rows, cells, part, roles = study
        for row in rows:
            t = row.training
            print(
                f'{t.network}, {t.size} a class, {t.block}, {t.role} '
                f'{t.seed}, rate {t.lr:g}, {t.epochs} epochs: '
                f'{row.top1:.2f} %, {row.seconds:.1f} s',
                flush=True,
            )
        record = read_record(out)
        if plot:
            draw_study(record, cells, part, plot)
    if roles:
        print_follow_ups(record, cells, part, roles)
    else:
        print_study(record, cells, part)


def _fashion(args, out):
    import torch
    from workshop.study.follow import FOLLOW_UPS
    from workshop.study.plan import cells_for
    from workshop.study.run import Plan, run_study
    from workshop.study.training import Machine
    from workshop.study.variants import PARTS

    machine = Machine(torch.device(args.device), args.precision, args.graphs)
    part = _chosen(args, PARTS[args.part])
    cells = cells_for(
        args.networks,
        args.sizes,
        machine.name,
        width=args.width,
        batch=args.batch,
        epochs=args.epochs,
    )
    roles = FOLLOW_UPS.get(args.part, {})
    data_root = args.data_root or 'data/fashion_mnist'
    plan = Plan(data_root, cells, part, args.seeds, machine, roles)
    return run_study(plan, out, args.minutes, args.jobs), cells, part, roles


def _tasks(args, out):
    from workshop.study.tasks import (
        NETWORKS,
        PART,
        TaskPlan,
        base_config,
        cell_of,
        run_tasks,
    )

    part, names = _chosen(args, PART), args.networks or [*NETWORKS]
    data_root = args.data_root or 'data'
    plan = TaskPlan(HOME, data_root, names, part, args.seeds)
    rows = run_tasks(plan, out, args.minutes)
    cells = [
        cell_of(name, base_config(HOME, name))
        for name in names
        if name in NETWORKS
    ]
    return rows, cells, part, {}


def _chosen(args, part):
    return part._replace(blocks=tuple(args.blocks)) if args.blocks else part


if __name__ == '__main__':
    run(parse_args, main)
