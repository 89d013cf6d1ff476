# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Build wheel and source archive, and check them; see `make dist`."""

import argparse
import sys
from pathlib import Path

from workshop.release import build_release

from mmdbb.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='folder without files, such as dist')
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    try:
        files = build_release(root, Path(args.out))
    except UserError as error:
        print(f'build_release.py: {error}', file=sys.stderr)
        sys.exit(2)
    for file in files:
        print(file)


if __name__ == '__main__':
    main()
