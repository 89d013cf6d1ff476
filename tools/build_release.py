# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Build wheel and source archive, and check them; see `make dist`."""

from pathlib import Path

from arguments import Parser, run


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='folder without files, such as dist')
    return parser.parse_args()


def main(args):
    from workshop.release import build_release

    root = Path(__file__).resolve().parents[1]
    files = build_release(root, Path(args.out))
    for file in files:
        print(file)


if __name__ == '__main__':
    run(parse_args, main, hosts=False)
