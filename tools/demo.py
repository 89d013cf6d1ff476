# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train a small ResNet-18-DBB on real digits, merge it, and compare.

Takes some minutes on two CPU cores. A failed stage ends with exit code 1.
"""

from pathlib import Path

from arguments import Parser, run, seed

TASKS = ('classification', 'detection', 'segmentation')


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--task', choices=TASKS, default='classification')
    parser.add_argument(
        '--work-dir',
        help='folder for checkpoints, logs and the picture; default: '
        'work_dirs/demo_TASK',
    )
    parser.add_argument(
        '--data-root',
        default='data',
        help='folder that has or gets the data set; default: data',
    )
    parser.add_argument(
        '--seed', type=seed, default=0, help='of the training; default: 0'
    )
    return parser.parse_args()


def main(args):
    from workshop.demo.run import run_demo

    home = Path(__file__).resolve().parents[1]
    run_demo(args.task, home, args.work_dir, args.data_root, args.seed)


if __name__ == '__main__':
    run(parse_args, main)
