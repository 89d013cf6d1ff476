"""Write the demo's data sets (real digits) in the layouts of ImageNet,
COCO and Cityscapes. A complete data set is left alone."""
import argparse
import sys

from mmdbb.demo import DemoError
from mmdbb.demo.layouts import LAYOUTS
from mmdbb.demo.prepare import prepare


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--task', nargs='+', choices=list(LAYOUTS), default=list(LAYOUTS),
        help='the tasks to write a data set for (default: all)')
    parser.add_argument('--root', default='data', help='default: data')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--train', type=int, metavar='N',
        help='images to train on, instead of each data set\'s own number')
    parser.add_argument(
        '--val', type=int, metavar='N', help='images to validate on, likewise')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        for task in args.task:
            print(prepare(task, args.root, args.seed, args.train, args.val))
    except DemoError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
