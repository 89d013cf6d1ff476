# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Measure what blocks cost, against plain convolutions, in one run.

  python tools/benchmark.py --network resnet18 --batch 16

prints a table for each phase, and with --out writes it as JSON; --plot draws
how a block's time and memory grow with batch, width and resolution.

  python tools/benchmark.py --import

prints what `import mmdbb` takes beyond `import torch`.

  python tools/benchmark.py --kernels 7 13 31 --block DilatedReparamConv

measures large depthwise kernels beside plain ones.
"""

import json
import logging
import platform
from pathlib import Path

import torch
from workshop import benchmark

from mmdbb.blocks.build import registered_blocks
from mmdbb.errors import UserError
from mmdbb.mm.engine.command import (
    Parser,
    add_image_size_argument,
    at_least_one,
    run_command,
)
from mmdbb.mm.engine.measure import check_picture, print_table, report_files


def parse_args():
    parser = Parser(description='Measure what blocks cost')
    parser.add_argument(
        '--network',
        nargs='+',
        choices=list(benchmark.NETWORKS),
        default=['resnet18'],
    )
    parser.add_argument(
        '--block', default='DBB', help='DBB (default), ACB, OREPA, ...'
    )
    parser.add_argument(
        '--phase',
        nargs='+',
        choices=benchmark.PHASES,
        default=list(benchmark.PHASES),
    )
    parser.add_argument(
        '--batch', type=at_least_one, default=16, help='images'
    )
    add_image_size_argument(parser, 'pixels', (224, 224))
    parser.add_argument(
        '--threads', type=at_least_one, help='threads of torch'
    )
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--precision',
        choices=list(benchmark.PRECISIONS),
        default='float32',
        help='autocast to this; default: %(default)s',
    )
    parser.add_argument(
        '--sync',
        action='store_true',
        help='also a step with SyncBN, on two processes of the CPU',
    )
    parser.add_argument(
        '--compile', action='store_true', help='run under torch.compile'
    )
    parser.add_argument(
        '--graphs',
        action='store_true',
        help='replay each step as a CUDA graph: the time of the GPU alone',
    )
    parser.add_argument(
        '--repeats',
        type=at_least_one,
        default=5,
        help='times that each variant runs; default: %(default)s',
    )
    parser.add_argument(
        '--import',
        dest='imports',
        action='store_true',
        help='measure `import mmdbb` and nothing else',
    )
    parser.add_argument(
        '--kernels',
        nargs='+',
        type=at_least_one,
        metavar='SIZE',
        help='measure one depthwise block of each size and nothing else',
    )
    parser.add_argument('--out', help='write the rows to this JSON file')
    parser.add_argument('--plot', help='draw the growth of one block here')
    parser.add_argument(
        '--force', action='store_true', help='replace files that exist'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    if args.imports:
        print_imports(args.repeats)
    elif args.kernels:
        print_kernels(args)
    else:
        write_report(args)


def device_of(args):
    try:
        return torch.zeros(1, device=args.device).device
    except RuntimeError as error:
        raise UserError(f'--device {args.device}: {error}') from error


def print_kernels(args):
    check_block(args.block)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = benchmark.large_kernels(
        args.block, args.kernels, args.batch, device_of(args), args.repeats
    )
    cells, plain = [], None
    for row in rows:
        plain = row if row.variant == 'plain' else plain
        cells.append(
            (
                f'{row.size}x{row.size}',
                row.variant,
                f'{row.train_ms:.1f}',
                ratio(row.train_ms, plain.train_ms),
                f'{row.kept_mb:.1f}',
                ratio(row.kept_mb, plain.kept_mb),
                f'{row.eval_ms:.1f}',
                ratio(row.eval_ms, plain.eval_ms),
            )
        )
    header = ('kernel', args.block, 'step ms', '/ plain', 'kept MB')
    print_table(header + ('/ plain', 'eval ms', '/ plain'), cells)


def write_report(args):
    device = device_of(args)
    images = torch.randn(args.batch, 3, *args.image_size, device=device)
    check_block(args.block)
    check_picture(args.plot)
    if args.graphs and device.type != 'cuda':
        raise UserError(f'--graphs is for GPUs, not for {args.device}')
    if args.threads:
        torch.set_num_threads(args.threads)
    files = report_files(args.out, args.plot, overwrite=args.force)
    with files as (out, plot):
        report = measure(args, images)
        if plot:
            points = list(benchmark.growth(args.block, device, args.repeats))
            report['growth'] = [point._asdict() for point in points]
            draw_growth(points, plot)
        if out:
            Path(out).write_text(json.dumps(report, indent=1) + '\n')


def print_imports(repeats):
    rows = [
        (name, *(f'{seconds:.2f}' for seconds in time))
        for name, time in benchmark.import_times(repeats).items()
    ]
    header = ('import', 'torch (s)', 'mmdbb beyond it (s)', 'working (s)')
    print_table(header, rows)


def measure(args, images):
    logging.disable(logging.INFO)
    rows = []
    for network in args.network:
        for phase in args.phase:
            found = benchmark.run_phase(
                phase,
                network,
                args.block,
                images,
                args.repeats,
                args.compile,
                args.precision,
                args.graphs,
            )
            rows += [dict(network=network, **as_dict(row)) for row in found]
            title = f'{network}, {args.block}, {phase}, {args.precision}'
            print_rows(title, found)
        if args.sync:
            found = benchmark.sync_rows(
                network, args.block, images, args.repeats
            )
            rows += [dict(network=network, **as_dict(row)) for row in found]
            print_rows(f'{network}, {args.block}, SyncBN', found)
        bound = benchmark.composing_bound(network, args.block, images)
        if bound > 1:
            print(f'composing multiplies at least to {bound:.3f} of plain')
    return dict(
        settings=vars(args),
        machine=dict(
            processor=platform.processor() or platform.machine(),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        ),
        rows=rows,
    )


def check_block(name):
    blocks = registered_blocks()
    if name not in blocks:
        raise UserError(f'--block {name}: allowed are {sorted(blocks)}')


def as_dict(row):
    return dict(row._asdict(), time=row.time._asdict())


def print_rows(title, rows):
    first = rows[0]
    literal = next((r for r in rows if r.variant == 'literal'), None)
    header = ('variant', 'ms', 'spread', f'/ {first.variant}')
    header += ('/ literal', 'kept MB', '/ literal', 'peak MB')
    cells = [
        (
            row.variant,
            f'{row.time.median:.1f}',
            f'{row.time.fastest:.1f}-{row.time.slowest:.1f}',
            ratio(row.time.median, first.time.median),
            ratio(row.time.median, literal and literal.time.median),
            '' if row.kept_mb is None else f'{row.kept_mb:.1f}',
            ratio(row.kept_mb, literal and literal.kept_mb),
            '' if row.peak_mb is None else f'{row.peak_mb:.1f}',
        )
        for row in rows
    ]
    print_table(header, cells, title=title)


def ratio(value, base):
    return '' if not value or not base else f'{value / base:.3f}'


def draw_growth(points, path):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharey='row')
    units = dict(batch='images', width='channels', resolution='pixels a side')
    for column, axis in enumerate(benchmark.AXES):
        for variant in ('plain', 'literal', 'default'):
            mine = [
                p for p in points if (p.axis, p.variant) == (axis, variant)
            ]
            values = [p.value for p in mine]
            for row, field in enumerate(('ms', 'kept_mb')):
                axes[row, column].loglog(
                    values,
                    [getattr(p, field) for p in mine],
                    'o-',
                    label=variant,
                )
                axes[row, column].grid(alpha=0.3)
        axes[1, column].set_xlabel(f'{axis} ({units[axis]})')
    axes[0, 0].set_ylabel('training step (ms)')
    axes[1, 0].set_ylabel('kept for backward (MB)')
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    run_command(main)
