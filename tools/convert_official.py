# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Turn a checkpoint of the papers' repositories into one of mmpretrain.

  python tools/convert_official.py SRC OUT.pth

reads a file that the code of DBB or OREPA wrote, of a training-time or a
converted network, and writes the weights OUT.pth and the config OUT.py. The
tool recognises architecture, block and structure by itself.
"""

from arguments import (
    Parser,
    add_output_argument,
    add_unsafe_argument,
    run,
)
from arguments.paths import check_input


def parse_args():
    parser = Parser(
        description="Convert a checkpoint of the papers' repositories"
    )
    parser.add_argument(
        'source', help='path of the official file: .pth, .pth.tar or .hdf5'
    )
    parser.checks.append(
        lambda args: check_input(parser, args.source, 'official file')
    )
    add_output_argument(
        parser,
        'out',
        'checkpoint to write, *.pth or *.safetensors',
        suffixes=('.pth', '.safetensors'),
        inputs=('source',),
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace the output files if they exist',
    )
    add_unsafe_argument(parser)
    return parser.parse_args()


def main(args):
    from mmdbb.deploy import convert_official

    result = convert_official(
        args.source,
        args.out,
        overwrite=args.force,
        unsafe=args.unsafe_load,
    )
    print(f'recognised {result.network}: {result.entries} entries')
    print(f'weights: {result.checkpoint}')
    print(f'config:  {result.config}')


if __name__ == '__main__':
    run(parse_args, main)
