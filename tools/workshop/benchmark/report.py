# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The benchmark's tables, its JSON file and its picture."""

from __future__ import annotations

import argparse
import json
import logging
import platform
from pathlib import Path

import torch

from mmdbb.blocks.build import registered_blocks
from mmdbb.errors import UserError
from mmdbb.mm.engine.measure import check_picture, print_table, report_files
from workshop import benchmark


def write_report(args: argparse.Namespace) -> None:
    """Measure what the arguments ask for, print it and write the files.

    Args:
        args: Parsed arguments of `tools/benchmark.py`.

    Raises:
        UserError: If an argument does not fit the machine.
    """
    device = _device_of(args)
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


def print_kernels(args: argparse.Namespace) -> None:
    """Measure large depthwise kernels beside plain ones, and print it.

    Args:
        args: Parsed arguments of `tools/benchmark.py`.

    Raises:
        UserError: If an argument does not fit the machine.
    """
    check_block(args.block)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = benchmark.large_kernels(
        args.block, args.kernels, args.batch, _device_of(args), args.repeats
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


def print_imports(repeats: int) -> None:
    """Print what importing mmdbb takes beyond torch.

    Args:
        repeats: How many times each import is timed.
    """
    rows = [
        (name, *(f'{seconds:.2f}' for seconds in time))
        for name, time in benchmark.import_times(repeats).items()
    ]
    header = ('import', 'torch (s)', 'mmdbb beyond it (s)', 'working (s)')
    print_table(header, rows)


def _device_of(args: argparse.Namespace) -> torch.device:
    try:
        return torch.zeros(1, device=args.device).device
    except RuntimeError as error:
        raise UserError(f'--device {args.device}: {error}') from error


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
            spread(row.time),
            ratio(row.time.median, first.time.median),
            ratio(row.time.median, literal and literal.time.median),
            '' if row.kept_mb is None else f'{row.kept_mb:.1f}',
            ratio(row.kept_mb, literal and literal.kept_mb),
            '' if row.peak_mb is None else f'{row.peak_mb:.1f}',
        )
        for row in rows
    ]
    print_table(header, cells, title=title)


def spread(time):
    """Fastest to slowest; one run has no spread."""
    if time.fastest == time.slowest:
        return ''
    return f'{time.fastest:.1f}-{time.slowest:.1f}'


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
