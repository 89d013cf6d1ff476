# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train a small network with DBBs in plain PyTorch, merge it, and compare.

Takes half a minute on one CPU core, and needs no package of OpenMMLab. A call
that was cut goes on from its last epoch.
"""

import argparse
import sys

from workshop.demo.plain_torch import run_torch_demo, use_one_thread

from mmdbb.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--work-dir',
        default='work_dirs/demo_torch',
        help='folder for checkpoint and merged weights; default: %(default)s',
    )
    args = parser.parse_args()
    use_one_thread()
    try:
        run_torch_demo(args.work_dir)
    except UserError as error:
        print(f'demo_torch.py: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('\ninterrupted; the next call goes on', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
