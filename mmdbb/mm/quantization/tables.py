# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Tables and plots of ``tools/quantize.py`` and ``tools/range_report.py``."""

from __future__ import annotations

import math
from typing import List

from mmdbb.mm.engine.measure import check_picture, print_table
from mmdbb.mm.quantization.ptq import Quantized
from mmdbb.mm.quantization.ranges import KernelRange
from mmdbb.mm.quantization.sensitivity import Sensitivity
from mmdbb.ranges import OUTLIER

_TITLES = dict(
    trained='trained, PyTorch',
    merged='merged, ONNX float',
    int8='INT8, ONNX',
)


def print_quantized(result: Quantized) -> None:
    """Print a table with one column for each stage, and the file's path.

    Args:
        result: What :func:`mmdbb.mm.quantization.ptq.quantize_checkpoint`
            returned.
    """
    stages = result.stages
    height, width = result.image_size
    rows = [
        ('size (KiB)', *(f'{s.size / 1024:,.0f}' for s in stages)),
        ('latency (ms)', *(f'{1e3 * s.latency:.2f}' for s in stages)),
    ]
    if stages[0].figure is not None:
        points = [f'{stage.figure.points:.2f}' for stage in stages]
        rows.insert(0, (stages[0].figure.title, *points))
    ranges = (
        f'Calibrated with {result.images} images.'
        if result.images
        else 'Ranges learned in training.'
    )
    left = ', '.join(f'{n} {op}' for op, n in result.layers.left.items())
    print_table(
        ('', *(_TITLES[stage.name] for stage in stages)),
        rows,
        f'{ranges} In integers: {result.layers.quantized} convolutions and '
        f'matrix products; in floating point: {left or "nothing"}. Latency: '
        f'median for one image of {height} x {width} pixels, on one thread, '
        'the networks timed in turn. Size: of the weights in PyTorch, of the '
        'files in ONNX.',
    )
    for trial in result.trials:
        print(
            f'tried: {len(trial.kept)} layers in float for the budget, fall '
            f'{trial.drop:.2f}'
        )
    if result.kept:
        print(f'left in float: {", ".join(result.kept)}')
    print(f'takes images of {height} x {width} pixels')
    print(f'INT8 network: {result.path}')


def print_sensitivity(report: Sensitivity) -> None:
    """Print the report as a table, and the file's path.

    Args:
        report: What
            :func:`mmdbb.mm.quantization.sensitivity.report_sensitivity`
            returned.
    """
    print_table(
        ('layer', 'error of the outputs (%)'),
        [(e.name, f'{100 * e.error:.3f}') for e in report.layers],
        f'Each layer alone in integers, on {report.images} images. Error: '
        'root mean square of the difference from the outputs in float, '
        'divided by that of these outputs; of several outputs, the largest.',
    )
    print(f'report: {report.path}')


def print_ranges(ranges: List[KernelRange]) -> None:
    """Print the report as a table, and mark the worst layer.

    Args:
        ranges: What :func:`mmdbb.mm.quantization.ranges.kernel_ranges`
            returned.
    """
    worst = min(ranges, key=lambda r: r.snr).name
    rows = [
        (
            f'{r.name} *' if r.name == worst else r.name,
            r.kind,
            f'{r.low:.3g} .. {r.high:.3g}',
            f'{100 * r.outliers:.2f}',
            f'{r.spread:.1f}',
            f'{r.snr:.1f}',
            f'{r.snr_per_tensor:.1f}',
            ', '.join(
                f'{name} {100 * share:.0f}'
                for name, share in sorted(
                    r.branches.items(), key=lambda item: -item[1]
                )
            ),
        )
        for r in ranges
    ]
    print_table(
        (
            'layer',
            'kind',
            'range',
            'outliers (%)',
            'spread',
            'SNR (dB)',
            'one scale (dB)',
            'largest from (%)',
        ),
        rows,
        f'Outliers: weights beyond {OUTLIER:g} standard deviations. Spread: '
        'range of the widest channel, divided by the median range. SNR: '
        'ratio of the kernel to its rounding error in INT8, with one scale a '
        'channel, and with one scale for the kernel. Largest from: share of '
        'each branch in the largest weights of the channels. *: the layer '
        'with the lowest SNR.',
    )


def plot_ranges(ranges: List[KernelRange], path: str) -> None:
    """Draw the ranges of each layer's channels, and below them the SNR.

    Args:
        ranges: What :func:`mmdbb.mm.quantization.ranges.kernel_ranges`
            returned.
        path: Path of the picture to write; its ending chooses a format that
            matplotlib knows.

    Raises:
        UserError: If matplotlib is missing, or does not know the format.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.32 * len(ranges) + 2), 6))
    above, below = figure.subplots(2, 1, sharex=True)
    places = range(len(ranges))
    # A logarithmic axis cannot show channels of zeros.
    above.boxplot(
        [[c for c in r.channels if c] or [1e-12] for r in ranges],
        positions=list(places),
        whis=(0, 100),
        widths=0.6,
    )
    above.set_yscale('log')
    above.set_ylabel('largest weight of a channel')
    finite = [r.snr if math.isfinite(r.snr) else math.nan for r in ranges]
    single = [
        r.snr_per_tensor if math.isfinite(r.snr_per_tensor) else math.nan
        for r in ranges
    ]
    below.plot(places, finite, 'o', label='one scale a channel')
    below.plot(places, single, 'x', label='one scale')
    below.set_ylabel('SNR (dB)')
    below.set_xticks(
        list(places), [r.name for r in ranges], rotation=90, fontsize=6
    )
    below.legend()
    figure.tight_layout()
    figure.savefig(path)
