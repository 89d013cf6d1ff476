# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train a small network with DBBs in plain PyTorch, merge it, and compare.

Takes half a minute on one CPU core, and needs no package of OpenMMLab. A call
that was cut goes on from its last epoch.
"""

from arguments import Parser, run


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--work-dir',
        default='work_dirs/demo_torch',
        help='folder for checkpoint and merged weights; default: %(default)s',
    )
    return parser.parse_args()


def main(args):
    from workshop.demo.plain_torch import run_torch_demo, use_one_thread

    use_one_thread()
    run_torch_demo(args.work_dir)


if __name__ == '__main__':
    run(parse_args, main, hosts=False)
