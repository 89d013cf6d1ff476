# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The part of the page on one layer, which opens on demand."""

from __future__ import annotations

from html import escape
from typing import List

from mmdbb.report.figures import BranchFigures, LayerFigures
from mmdbb.report.pictures import (
    channels_picture,
    filters_picture,
    kernel_picture,
)
from mmdbb.report.pieces import (
    NOTHING,
    Cell,
    Column,
    Palette,
    code,
    difference,
    large,
    number,
    percent,
    saved,
    table,
)

_ANGLE = 'Angle between two kernels: 0° the same direction, 90° unrelated'


def details(layer: LayerFigures, number_: int, palette: Palette) -> str:
    """The part on one layer.

    Args:
        layer: Its figures.
        number_: Its place in the network, from 1.
        palette: Colours of the branches.
    """
    parts = {n: b.projection for n, b in layer.branches.items()}
    return (
        f'<details class="layer" id="layer-{number_}" '
        f'data-layer="{escape(layer.name)}">'
        f'<summary>{code(layer.name)}'
        f'<span class="quiet">{_what(layer)}</span>'
        f'{palette.bar(parts)}</summary>'
        f'<div class="inside">{_kernels(layer)}'
        f'{_branches(layer, palette)}'
        f'<div class="two"><div>{_filters(layer)}</div>'
        f'<div>{_range(layer)}{_cost(layer)}</div></div>'
        f'</div></details>'
    )


def shape_of(layer: LayerFigures) -> str:
    """A kernel's shape, as in ``3×3, 64→128``."""
    out, inside, *taps = layer.shape
    return f'{"×".join(map(str, taps))}, {inside}→{out}'


def _what(layer: LayerFigures) -> str:
    more = f', {layer.geometry}' if layer.geometry else ''
    return f'{escape(layer.kind)}, {shape_of(layer)}{escape(more)}'


def _kernels(layer: LayerFigures) -> str:
    branches = layer.branches
    largest = max(
        layer.taps.max().item(),
        *(b.taps.max().item() for b in branches.values()),
    )
    pictures = [('merged', layer.taps)]
    pictures += [(name, branch.taps) for name, branch in branches.items()]
    figures = ''.join(
        f'<figure>{kernel_picture(taps, largest, name)}'
        f'<figcaption>{escape(name)}</figcaption></figure>'
        for name, taps in pictures
    )
    return (
        '<h3>Mean magnitude at each tap, all on one scale</h3>'
        f'<div class="kernels">{figures}</div>'
    )


def _branches(layer: LayerFigures, palette: Palette) -> str:
    branches = layer.branches
    measured = any(b.lost for b in branches.values())
    kinds = {b.gammas.kind for b in branches.values() if b.gammas}
    columns = [
        Column('Branch', left=True),
        Column('Part', 'Of the merged kernel; the parts add up to 100 %'),
        Column('Length', 'Of the branch’s kernel, against the merged one'),
        Column('Angle', 'To the merged kernel'),
        Column(
            f'|{" or ".join(sorted(kinds)) or "gamma"}|',
            'Smallest, median and largest factor of the branch',
        ),
    ]
    if measured:
        columns += [
            Column('Layer without it', 'Change of the layer’s output'),
            Column('Network without it', 'Change of the network’s output'),
        ]
    others = [
        Column(f'∠ {name}', _ANGLE) for name in branches if len(branches) > 1
    ]
    rows = [
        _row(name, branch, palette, measured)
        + [
            Cell('') if name == other else _angle(branch.angles.get(other))
            for other in branches
            if len(branches) > 1
        ]
        for name, branch in branches.items()
    ]
    caption = f'Branches of {layer.name or "the network"}'
    return '<h3>Branches</h3>' + table(
        columns + others, rows, caption, 'names'
    )


def _row(
    name: str, branch: BranchFigures, palette: Palette, measured: bool
) -> List[Cell]:
    gammas = NOTHING
    if branch.gammas:
        values = branch.gammas[1:]
        gammas = ' · '.join(f'{value:.3g}' for value in values)
    cells = [
        Cell(palette.swatch(name)),
        Cell(palette.part(name, branch.projection)),
        percent(branch.share),
        _angle(branch.angle),
        Cell(gammas),
    ]
    if measured:
        lost = branch.lost
        cells += [
            percent(lost and lost.layer),
            percent(lost and lost.network, 2),
        ]
    return cells


def _angle(degrees) -> Cell:
    return number(degrees, '.0f', '°')


def _filters(layer: LayerFigures) -> str:
    count, out = len(layer.filters), layer.shape[0]
    which = f'The first {count} of {out}' if count < out else f'All {out}'
    return (
        '<h3>Merged filters</h3><figure class="sheet">'
        f'{filters_picture(layer.filters, layer.name or "the network")}'
        f'<figcaption class="wide">{which}, each at the input channel that it '
        'weighs most. Red is positive, blue negative.</figcaption></figure>'
    )


def _range(layer: LayerFigures) -> str:
    found = layer.range
    folded = f', with {code(layer.folded)} folded in' if layer.folded else ''
    return (
        '<h3>Range and INT8</h3>'
        f'{channels_picture(found.channels)}'
        f'<p class="quiet">Largest weight of each channel, sorted{folded}. '
        f'All weights lie in {found.low:.3g} … {found.high:.3g}; '
        f'{100 * found.outliers:.2f} % are outliers. The widest channel has '
        f'{found.spread:.1f} times the median range. Signal over rounding '
        f'noise: {number(found.snr, ".1f", " dB").html} with one scale a '
        f'channel, {number(found.snr_per_tensor, ".1f", " dB").html} with '
        'one scale.</p>'
    )


def _cost(layer: LayerFigures) -> str:
    before, after = layer.before, layer.after
    text = (
        f'{large(before.parameters)} → {large(after.parameters)} parameters '
        f'({saved(before.parameters, after.parameters)})'
    )
    if before.flops is not None:
        text += (
            f', {large(before.flops)} → {large(after.flops)} operations for '
            f'one image ({saved(before.flops, after.flops)})'
        )
    proof = ''
    if layer.difference is not None:
        proof = (
            ' Largest difference between the sum of branches and the merged '
            f'layer in float64: {difference(layer.difference)}.'
        )
    return f'<h3>Cost and proof</h3><p class="quiet">{text}.{proof}</p>'
