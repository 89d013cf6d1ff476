# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Try blocks in every network that OpenMMLab's packages have a config for.

  python tools/sweep.py sweep.jsonl

takes each distinct architecture of the installed packages once, gives
conv_cfg=dict(type='DBB') to every part that takes it, builds, trains, starts
from plain weights, merges and compares. sweep.jsonl gets a line for each; if
the run is cut, the same command goes on. With --docs the results are written
into docs/hosts.md.
"""

from pathlib import Path

from arguments import Parser, at_least_one, run

#: The packages whose configs can be tried.
PACKAGES = (
    'mmpretrain',
    'mmdet',
    'mmseg',
    'mmpose',
    'mmaction',
    'mmdet3d',
    'mmyolo',
    'mmocr',
    'mmrotate',
)

ROOT = Path(__file__).resolve().parents[1]


def parse_args():
    parser = Parser(description='Try blocks in all networks of the packages')
    parser.add_argument('rows', help='file with a line for each architecture')
    parser.add_argument(
        '--packages',
        nargs='+',
        choices=PACKAGES,
        help='import names; by default all that are installed',
    )
    parser.add_argument(
        '--only',
        default='',
        metavar='TEXT',
        help='only architectures whose config or classes have this text',
    )
    parser.add_argument(
        '--every',
        type=at_least_one,
        default=1,
        metavar='N',
        help='only each N-th architecture, for a quick look',
    )
    parser.add_argument(
        '--again',
        action='store_true',
        help='try architectures again that failed',
    )
    parser.add_argument(
        '--docs', action='store_true', help='write docs/hosts.md'
    )
    parser.add_argument(
        '--jobs', type=at_least_one, default=2, help='processes at once'
    )
    parser.add_argument(
        '--seconds',
        type=float,
        default=60.0,
        help='for one architecture; default: %(default)s',
    )
    parser.add_argument(
        '--gigabytes',
        type=float,
        default=8.0,
        help='memory for one architecture; default: %(default)s',
    )
    return parser.parse_args()


def main(args):
    from workshop.sweep.packages import installed
    from workshop.sweep.run import Limits
    from workshop.sweep.table import write_page
    from workshop.sweep.whole import sweep_packages

    rows = Path(args.rows)
    limits = Limits(args.jobs, args.seconds, args.gigabytes)
    packages = args.packages or installed()
    for line in sweep_packages(
        packages, rows, limits, args.only, args.every, args.again
    ):
        print(line, flush=True)
    if args.docs:
        print(write_page(ROOT, rows))


if __name__ == '__main__':
    run(parse_args, main)
