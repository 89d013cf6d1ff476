# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Compute the sizes of all configs' networks; write the model zoo.

  python tools/model_zoo.py

writes the tables of docs/model_zoo.md and configs/metafile.yml. Results that
authors report are read from configs/reported.yml.
"""

from pathlib import Path

from arguments import Parser, run

ROOT = Path(__file__).resolve().parents[1]


def parse_args():
    return Parser(
        description='Write docs/model_zoo.md and configs/metafile.yml'
    ).parse_args()


def main(args):
    from workshop.model_zoo import write_zoo

    for path in write_zoo(ROOT):
        print(path)


if __name__ == '__main__':
    run(parse_args, main)
