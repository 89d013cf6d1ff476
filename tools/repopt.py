# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write the scales that a search found, for training with RepOptimizer.

  python tools/repopt.py SEARCH_CONFIG SEARCH_CHECKPOINT SCALES.pth

The search trains a network with conv_cfg=dict(type='LinearAdd'). The file goes
into paramwise_cfg of RepOptimWrapperConstructor, and into init_cfg of type
RepOpt. Scales of the paper's code for RepOpt-VGG are read too, with the config
of the RepVGG that shall be trained.
"""

from mmdbb.deploy import Source
from mmdbb.mm.engine.command import (
    Parser,
    add_config_arguments,
    add_unsafe_argument,
    load_config,
    run_command,
)
from mmdbb.mm.engine.repopt import write_scales


def parse_args():
    parser = Parser(description='Write the scales that a search found')
    add_config_arguments(parser, work_dir=False)
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument('out', help='file to write, *.pth or *.safetensors')
    parser.add_argument(
        '--force', action='store_true', help='replace an existing file'
    )
    add_unsafe_argument(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    source = Source(
        load_config(args), args.checkpoint, unsafe=args.unsafe_load
    )
    scales = write_scales(source, args.out, overwrite=args.force)
    branches = sorted({key for own in scales.values() for key in own.scales})
    print(
        f'scales of {len(scales)} convolutions, branches '
        f'{", ".join(branches)}: {args.out}'
    )


if __name__ == '__main__':
    run_command(main)
