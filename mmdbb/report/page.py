# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write a report into one HTML page that needs nothing else.

The page has its style, script and pictures inside, and its policy forbids a
browser to fetch anything. Without a script it shows the same; only sorting,
filtering and the switch of colours need one.
"""

from __future__ import annotations

from html import escape
from typing import Any, Iterator, List

from mmdbb.report.details import details, shape_of
from mmdbb.report.figures import Cost, LayerFigures, Report
from mmdbb.report.findings import findings
from mmdbb.report.pieces import (
    Cell,
    Column,
    Palette,
    code,
    difference,
    large,
    names_marked,
    number,
    percent,
    saved,
    table,
)
from mmdbb.report.style import CSS, SCRIPT
from mmdbb.version import __version__

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:"
)
_WORDS = {
    'Part': 'What a branch supplies of the merged kernel, in the direction of '
    'the merged kernel. The parts of a layer add up to 100 %. A branch whose '
    'kernel points the other way has a negative part, drawn hatched.',
    'Length': 'Length (Frobenius norm) of the branch’s kernel, divided by '
    'that of the merged kernel. The merged kernel moves by as much if the '
    'branch is left out. Lengths do not add up, because branches point in '
    'different directions.',
    'Angle': 'Between two kernels, taken as vectors. 0°: the same direction; '
    '90°: they have nothing in common; 180°: they cancel.',
    'Without it': 'Root mean square of the change of the outputs if the '
    'branch’s kernel and bias are taken out, divided by that of the outputs; '
    'of several outputs, the largest. Nothing is trained afterwards, so this '
    'says what the branch does in this network, not what a network trained '
    'without it would be worth.',
    'Gamma, scale': 'The factors that multiply a branch: gamma of its last '
    'norm, or the scales of a composed kernel (OREPA).',
    'SNR': 'Energy of the weights over energy of their rounding error in '
    'INT8, in decibels, with one scale for each output channel. 40 dB is an '
    'error of 1 %, 30 dB of 3 %. Norms behind the convolution are folded in.',
    'Spread': 'Range of the widest output channel, divided by the median '
    'range. With one scale for the whole kernel it tells how coarse the steps '
    'are for the others.',
    'Operations': 'Additions and multiplications for one image. Before: each '
    'branch run by itself, as the paper draws the block.',
}


def page(report: Report) -> str:
    """Write the page.

    Args:
        report: The figures.

    Returns:
        str: The HTML.
    """
    title = escape(report.title)
    palette = Palette(list(report.kinds))
    body = [
        _header(report),
        '<main id="main">',
        _cards(report),
        _chart(report, palette),
        _findings(report),
        _kinds(report, palette),
        _layers(report, palette),
        *_all_details(report, palette),
        _proof(report),
        _words(),
        '</main>',
        f'<footer>Written by mmdbb {escape(__version__)}. One file, nothing '
        'to load.</footer>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, '
        'initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f'<meta name="generator" content="mmdbb {escape(__version__)}">\n'
        f'<title>{title} – branches</title>\n<style>{CSS}</style>\n</head>\n'
        '<body>\n<a class="skip" href="#main">To the figures</a>\n'
        + '\n'.join(part for part in body if part)
        + f'\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _header(report: Report) -> str:
    facts = ''.join(
        f'<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>'
        for name, value in report.facts.items()
    )
    facts = f'<dl class="facts">{facts}</dl>' if facts else ''
    return (
        '<header><div><p class="kicker">What the branches did</p>'
        f'<h1>{escape(report.title)}</h1>{facts}</div>'
        '<button class="plain needs-js" id="theme" type="button">Dark'
        '</button></header>'
    )


def _card(label: str, value: str, below: str, kind: str = '') -> str:
    return (
        f'<div class="card"><span class="label">{label}</span>'
        f'<b class="{kind}">{value}</b><span>{below}</span></div>'
    )


def _cards(report: Report) -> str:
    before, after, proof = report.before, report.after, report.proof
    count = len(report.layers)
    branches = sum(len(layer.branches) for layer in report.layers)
    kinds = ', '.join(dict.fromkeys(x.kind for x in report.layers))
    cards = [
        _card(
            'Blocks merged',
            f'{count}',
            f'{branches} branches, {escape(kinds)}',
        ),
        _saving('Parameters', before.parameters, after.parameters),
    ]
    flops: Any = after.flops
    if before.flops is not None:
        cards.append(_saving('Operations, one image', before.flops, flops))
    if proof.equal:
        worst = max(
            [*proof.outputs.values(), *proof.layers.values()], default=0.0
        )
        cards.append(
            _card(
                'Merged = branches',
                '✓ proven',
                f'differ by {difference(worst)} in float64, allowed '
                f'{difference(proof.tolerance)}',
                'good',
            )
        )
    else:
        cards.append(
            _card('Merged = branches', '✗ not proven', 'see below', 'bad')
        )
    cards.append(
        _card(
            'Rounding in float32',
            difference(proof.single),
            'of the largest output',
        )
    )
    if report.score is not None:
        cards.append(
            _card(
                escape(report.metric),
                f'{report.score:.4g}',
                'of the merged network',
            )
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _saving(label: str, before: int, after: int) -> str:
    value = f'{large(before)} → {large(after)}'
    return _card(label, value, f'{saved(before, after)} by merging')


def _chart(report: Report, palette: Palette) -> str:
    layers = {
        layer.name: {n: b.projection for n, b in layer.branches.items()}
        for layer in report.layers
    }
    return (
        '<figure class="card chart"><figcaption class="wide"><b>Where the '
        'merged kernels come from</b>, from the first layer to the last'
        f'</figcaption>{palette.chart(layers)}{palette.legend()}</figure>'
    )


def _findings(report: Report) -> str:
    items = ''.join(
        f'<li class="{finding.kind}">{names_marked(finding.text)}</li>'
        for finding in findings(report)
    )
    return f'<ul class="findings">{items}</ul>' if items else ''


def _kinds(report: Report, palette: Palette) -> str:
    columns = [
        Column('Branch', left=True),
        Column('Layers', falling=True),
        Column('Mean part', 'Of the merged kernels', falling=True),
        Column('Least part', 'And the layer where it is least', left=True),
    ]
    has_change = any(k.network is not None for k in report.kinds.values())
    has_score = any(k.metric is not None for k in report.kinds.values())
    if has_change:
        columns.append(
            Column('Outputs without it', 'In all layers at once', falling=True)
        )
    if has_score:
        columns.append(Column(f'{report.metric} without it', falling=True))
    rows = []
    for name, kind in report.kinds.items():
        least, where = kind.weakest
        row = [
            Cell(palette.swatch(name), name),
            Cell(f'{kind.layers}', kind.layers),
            Cell(palette.part(name, kind.projection), kind.projection),
            Cell(f'{percent(least).html} in {code(where)}', least, True),
        ]
        if has_change:
            row.append(percent(kind.network))
        if has_score:
            row.append(number(kind.metric, '.4g'))
        rows.append(row)
    return (
        '<h2>Kinds of branches</h2>'
        + '<p class="quiet">Over all layers. '
        + _measured(report)
        + '</p>'
        + table(columns, rows, 'Kinds of branches', 'sortable names')
    )


def _measured(report: Report) -> str:
    if not report.images:
        return 'The network was not run on images.'
    plural = 's' * (report.images > 1)
    return f'Outputs are those on {report.images} image{plural}.'


def _layers(report: Report, palette: Palette) -> str:
    measured = any(b.lost for x in report.layers for b in x.branches.values())
    columns = [
        Column('Layer', 'In the network’s order', left=True),
        Column('Kernel', left=True),
        Column('Parts of the merged kernel', left=True, sortable=False),
        Column(
            'Weakest branch, length',
            'The branch without which the merged kernel moves least',
            left=True,
        ),
    ]
    if measured:
        columns.append(
            Column('Outputs without it', 'Without the weakest branch')
        )
    columns += [
        Column('SNR (dB)', 'In INT8, one scale a channel'),
        Column('Spread', 'Widest channel over the median', falling=True),
        Column('Parameters', 'Of the block → merged', falling=True),
    ]
    rows = [
        _layer_row(layer, i, palette, measured)
        for i, layer in enumerate(report.layers, 1)
    ]
    return (
        '<h2>Layers</h2>'
        '<div class="tools needs-js"><label class="visually-hidden" '
        'for="filter">Show layers whose name has</label>'
        '<input id="filter" type="search" placeholder="Filter by name" '
        'autocomplete="off"><span class="quiet" id="shown" role="status">'
        '</span></div>'
        + table(
            columns,
            rows,
            'Layers',
            'sortable names',
            [f'data-layer="{escape(x.name)}"' for x in report.layers],
        )
    )


def _layer_row(
    layer: LayerFigures, place: int, palette: Palette, measured: bool
) -> List[Cell]:
    branches = layer.branches
    weakest = min(branches, key=lambda name: branches[name].share)
    branch = branches[weakest]
    row = [
        Cell(f'<a href="#layer-{place}">{code(layer.name)}</a>', place),
        Cell(shape_of(layer), layer.shape[0] * layer.shape[1], True),
        Cell(
            palette.bar({n: b.projection for n, b in branches.items()}),
            '',
            True,
        ),
        Cell(
            f'{palette.swatch(weakest)} {percent(branch.share).html}',
            branch.share,
            True,
        ),
    ]
    if measured:
        row.append(percent(branch.lost and branch.lost.network, 2))
    return [
        *row,
        number(layer.range.snr, '.1f'),
        number(layer.range.spread, '.1f'),
        _parameters(layer.before, layer.after),
    ]


def _parameters(before: Cost, after: Cost) -> Cell:
    shown = f'{large(before.parameters)} → {large(after.parameters)}'
    return Cell(shown, before.parameters)


def _all_details(report: Report, palette: Palette) -> Iterator[str]:
    yield (
        '<h2>Each layer</h2><div class="tools"><button class="plain needs-js"'
        ' id="all" type="button" aria-pressed="false">Open all</button></div>'
    )
    for i, layer in enumerate(report.layers, 1):
        yield details(layer, i, palette)


def _proof(report: Report) -> str:
    proof = report.proof
    if proof.equal:
        verdict = (
            'Each branch was run by itself and the sum compared with the '
            'merged network, in float64. The largest difference allowed is '
            f'{difference(proof.tolerance)} of a channel’s largest magnitude.'
        )
    else:
        verdict = f'Not proven: {proof.refused}.'
    rows = [
        [Cell(code(name), name), Cell(difference(value), value)]
        for name, value in proof.outputs.items()
    ]
    found = (
        table(
            [Column('Output', left=True), Column('Difference', falling=True)],
            rows,
            'Differences of the outputs',
            'sortable names',
        )
        if rows
        else '<p class="quiet">The network was not run; its layers were '
        'compared one by one.</p>'
    )
    missing = ''.join(
        f'<li>{code(name)}: {escape(reason)}</li>'
        for name, reason in proof.left_out.items()
    )
    if missing:
        missing = (
            '<p>Not compared as a whole, but layer by layer:</p>'
            f'<ul>{missing}</ul>'
        )
    return (
        f'<h2>Proof</h2><p>{escape(verdict)} In float32, in which the merged '
        'network will run, it is '
        f'{difference(proof.single)} of the largest magnitude away: that is '
        f'rounding.</p>{found}{missing}'
    )


def _words() -> str:
    items = ''.join(
        f'<dt>{escape(word)}</dt><dd>{escape(text)}</dd>'
        for word, text in _WORDS.items()
    )
    return f'<h2>What the words mean</h2><dl class="words">{items}</dl>'
