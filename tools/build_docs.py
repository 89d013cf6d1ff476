# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Build the website of the docs, without a warning; see `make docs`."""

from pathlib import Path

from arguments import Parser, run


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='folder of the website; it is replaced')
    return parser.parse_args()


def main(args):
    from workshop.site.build import build_site

    root = Path(__file__).resolve().parents[1]
    built = build_site(root, Path(args.out))
    print(f'{Path(args.out) / "index.html"} ({", ".join(built)})')


if __name__ == '__main__':
    run(parse_args, main, hosts=False)
