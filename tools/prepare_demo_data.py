# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write the demo's data sets in the layouts of ImageNet, COCO, Cityscapes.

Real digits (MNIST-5k), alone and on photographs. A complete data set is left
alone, an interrupted one completed.
"""

from arguments import Parser, at_least_one, run, seed

TASKS = ('classification', 'detection', 'segmentation')


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--task',
        nargs='+',
        choices=TASKS,
        default=TASKS,
        help='the tasks to write a data set for; default: all',
    )
    parser.add_argument(
        '--root', default='data', help='folder to write into; default: data'
    )
    parser.add_argument('--seed', type=seed, default=0)
    parser.add_argument(
        '--train',
        type=at_least_one,
        metavar='N',
        help="images to train on; default: each data set's own number",
    )
    parser.add_argument(
        '--val',
        type=at_least_one,
        metavar='N',
        help='images to validate on, likewise',
    )
    return parser.parse_args()


def main(args):
    from workshop.demo.prepare import prepare

    for task in args.task:
        print(prepare(task, args.root, args.seed, args.train, args.val))


if __name__ == '__main__':
    run(parse_args, main)
