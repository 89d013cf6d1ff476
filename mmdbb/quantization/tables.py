# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What ``tools/quantize.py`` prints."""

from __future__ import annotations

from mmdbb.engine.measure import print_table
from mmdbb.quantization.ptq import Quantized

_TITLES = dict(
    trained='trained, PyTorch',
    merged='merged, ONNX float',
    int8='INT8, ONNX',
)


def print_quantized(result: Quantized) -> None:
    """Print the stages of a network side by side.

    Args:
        result: From :func:`mmdbb.quantization.ptq.quantize_checkpoint`.
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
