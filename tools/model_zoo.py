# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Compute the sizes of all configs' networks; write the model zoo.

  python tools/model_zoo.py

writes the tables of docs/model_zoo.md and configs/metafile.yml. Results that
authors report are read from configs/reported.yml.
"""

from pathlib import Path

from workshop.model_zoo import write_zoo

from mmdbb.mm.engine.command import Parser, run_command

ROOT = Path(__file__).resolve().parents[1]


def main():
    Parser(
        description='Write docs/model_zoo.md and configs/metafile.yml'
    ).parse_args()
    for path in write_zoo(ROOT):
        print(path)


if __name__ == '__main__':
    run_command(main)
