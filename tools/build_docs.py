# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Build the website of the docs, without a warning; see `make docs`."""

import argparse
import sys
from pathlib import Path

from workshop.site.build import build_site

from mmdbb.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='folder of the website; it is replaced')
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    try:
        built = build_site(root, Path(args.out))
    except UserError as error:
        print(f'build_docs.py: {error}', file=sys.stderr)
        sys.exit(2)
    print(f'{Path(args.out) / "index.html"} ({", ".join(built)})')


if __name__ == '__main__':
    main()
