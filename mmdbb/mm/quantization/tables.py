# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What ``tools/quantize.py`` and ``tools/range_report.py`` print and draw."""

from __future__ import annotations

import math
from typing import List

from mmdbb.mm.engine.measure import check_picture, print_table
from mmdbb.mm.quantization.ptq import Quantized
from mmdbb.mm.quantization.ranges import OUTLIER, KernelRange

_TITLES = dict(
    trained='trained, PyTorch',
    merged='merged, ONNX float',
    int8='INT8, ONNX',
)


def print_quantized(result: Quantized) -> None:
    """Print the stages of a network side by side.

    Args:
        result: From :func:`mmdbb.mm.quantization.ptq.quantize_checkpoint`.
    """
    stages = result.stages
    height, width = result.image_size
    rows = [
        ('size (KiB)', *(f'{s.size / 1024:,.0f}' for s in stages)),
        ('latency (ms)', *(f'{1e3 * s.latency:.2f}' for s in stages)),
    ]
    if stages[0].figure is not None:
        name = stages[0].figure.name
        points = [f'{stage.figure.points:.2f}' for stage in stages]
        rows.insert(0, (f'{name} (points)', *points))
    ranges = (
        f'Calibrated with {result.images} images.'
        if result.images
        else 'Ranges as they were trained.'
    )
    left = ', '.join(f'{n} {op}' for op, n in result.layers.left.items())
    print_table(
        ('', *(_TITLES[stage.name] for stage in stages)),
        rows,
        f'{ranges} In integers: {result.layers.quantized} convolutions and '
        f'matrix products; in floating point: {left or "nothing"}. Latency: '
        f'one image of {height} x {width} pixels, median, one thread, all in '
        'turn. Size: of the weights, of the files.',
    )
    print(f'INT8 network: {result.path}')


def print_ranges(ranges: List[KernelRange]) -> None:
    """Print the report as a table, the worst layer marked.

    Args:
        ranges: From :func:`kernel_ranges`.
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
        f'Outliers: beyond {OUTLIER:g} standard deviations. Spread: largest '
        'range of a channel over the median. SNR: of the kernel over its '
        'rounding to INT8, one scale a channel, and one for all. Largest '
        'from: whose the largest weight of each channel is. * has the least '
        'SNR.',
    )


def plot_ranges(ranges: List[KernelRange], path: str) -> None:
    """Draw the channels' ranges of each layer, and the SNR below.

    Args:
        ranges: From :func:`kernel_ranges`.
        path: The picture to write, in a format that matplotlib knows.

    Raises:
        UserError: If matplotlib is missing or does not know the format.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.32 * len(ranges) + 2), 6))
    above, below = figure.subplots(2, 1, sharex=True)
    places = range(len(ranges))
    # A logarithm has no place for channels of zeros.
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
