# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write the scales that a search found, for training with RepOptimizer.

  python tools/repopt.py SEARCH_CONFIG SEARCH_CHECKPOINT SCALES.pth

The search trains a network with conv_cfg=dict(type='LinearAdd'). The file goes
into paramwise_cfg of RepOptimWrapperConstructor, and into init_cfg of type
RepOpt. Scales of the paper's code for RepOpt-VGG are read too, with the config
of the RepVGG that shall be trained.
"""

from arguments import (
    Parser,
    add_checkpoint_argument,
    add_config_arguments,
    add_output_argument,
    add_unsafe_argument,
    run,
)


def parse_args():
    parser = Parser(description='Write the scales that a search found')
    add_config_arguments(parser, work_dir=False)
    add_checkpoint_argument(parser, 'path of the checkpoint')
    add_output_argument(
        parser,
        'out',
        'file to write, *.pth or *.safetensors',
        suffixes=('.pth', '.safetensors'),
    )
    parser.add_argument(
        '--force', action='store_true', help='replace an existing file'
    )
    add_unsafe_argument(parser)
    return parser.parse_args()


def main(args):
    from mmdbb.deploy import Source
    from mmdbb.mm.engine.command import load_config
    from mmdbb.mm.engine.repopt import write_scales

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
    run(parse_args, main)
