# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Pieces of the page: numbers, tables and bars, as HTML."""

from __future__ import annotations

import math
import re
from html import escape
from typing import Mapping, NamedTuple, Optional, Sequence, Union

from mmdbb.report.style import COLOURS

#: What a cell shows where nothing was measured.
NOTHING = '–'


class Cell(NamedTuple):
    """One cell of a table.

    Attributes:
        html: What it shows.
        value: What it is sorted by; empty where nothing was measured.
        left: Whether it is aligned to the left.
    """

    html: str
    value: Union[str, float] = ''
    left: bool = False


class Column(NamedTuple):
    """The head of a column.

    Attributes:
        title: What it says.
        help: What it means, shown where a pointer rests.
        falling: Whether a first click sorts the largest to the top.
        left: Whether it is aligned to the left.
        sortable: Whether it can be sorted by.
    """

    title: str
    help: str = ''
    falling: bool = False
    left: bool = False
    sortable: bool = True


def percent(share: Optional[float], digits: int = 1) -> Cell:
    """A share of 1 as per cent; a dash for None."""
    if share is None or math.isnan(share):
        return Cell(NOTHING)
    shown = f'{100 * share:.{digits}f} %' if math.isfinite(share) else '∞'
    return Cell(shown.replace('-', '−'), share)


def number(value: Optional[float], form: str, unit: str = '') -> Cell:
    """A number in a format; a dash for None."""
    if value is None or math.isnan(value):
        return Cell(NOTHING)
    shown = f'{value:{form}}{unit}' if math.isfinite(value) else '∞'
    return Cell(shown.replace('-', '−'), value)


def difference(value: Optional[float]) -> str:
    """A relative difference in words that a reader can take in."""
    if value is None:
        return NOTHING
    if math.isnan(value):
        return 'different shapes'
    return f'{value:.1e}'.replace('-', '−') if value else '0'


def large(value: Optional[int]) -> str:
    """A count with a thousand's letter, such as ``1.62 M``."""
    if value is None:
        return NOTHING
    for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if value >= size:
            return f'{value / size:.3g} {letter}'
    return f'{value}'


def saved(before: Optional[int], after: Optional[int]) -> str:
    """By how much a count falls."""
    if not before or after is None:
        return ''
    change = round(100 * (after / before - 1))
    return f'{change:+d} %'.replace('-', '−')


def names_marked(text: str) -> str:
    """Escape a sentence; what stands in backticks becomes code."""
    return re.sub(r'`([^`]*)`', r'<code>\1</code>', escape(text))


def code(name: str) -> str:
    """A name of a layer or branch. It may break behind its dots."""
    shown = escape(name or 'the network itself')
    return f'<code>{shown.replace(".", ".<wbr>")}</code>'


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    caption: str,
    kind: str = '',
    attributes: Optional[Sequence[str]] = None,
) -> str:
    """A table in a box that scrolls sideways where the screen is narrow.

    Args:
        columns: The heads.
        rows: The cells; the first of each row heads the row.
        caption: What the table is, for those who cannot see it.
        kind: Classes; ``'sortable'`` for one that is sorted by its heads.
        attributes: More attributes of each row.
    """
    sortable = 'sortable' in kind.split()
    heads = ''.join(_head(column, sortable) for column in columns)
    body = []
    for i, (first, *others) in enumerate(rows):
        more = f' {attributes[i]}' if attributes else ''
        body.append(
            f'<tr{more}><th scope="row"{_value(first)}>{first.html}</th>'
            + ''.join(
                f'<td{_value(c)}{_left(c.left)}>{c.html}</td>' for c in others
            )
            + '</tr>'
        )
    return (
        f'<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{escape(caption)}"><table class="{kind}">'
        f'<caption class="visually-hidden">{escape(caption)}</caption>'
        f'<thead><tr>{heads}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table></div>'
    )


def _head(column: Column, sortable: bool) -> str:
    title = escape(column.title)
    if column.help:
        title = f'<span title="{escape(column.help)}">{title}</span>'
    if sortable and column.sortable:
        title = f'<button type="button">{title}</button>'
    first = ' data-first="descending"' if column.falling else ''
    return f'<th scope="col"{first}{_left(column.left)}>{title}</th>'


def _value(cell: Cell) -> str:
    return f' data-value="{escape(str(cell.value))}"'


def _left(left: bool) -> str:
    return ' class="left"' if left else ''


class Palette:
    """A colour for each kind of branch.

    Args:
        kinds: Names of the branches, in the network's order.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self._colours = {
            kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)
        }

    def style(self, kind: str, more: str = '') -> str:
        """A ``style`` attribute with the branch's colour."""
        return f'style="--c:{self._colours.get(kind, COLOURS[-1])}{more}"'

    def swatch(self, kind: str) -> str:
        """The branch's colour and name."""
        return f'<span class="swatch" {self.style(kind)}></span>{code(kind)}'

    def legend(self) -> str:
        """All branches with their colours."""
        items = ''.join(f'<li>{self.swatch(k)}</li>' for k in self._colours)
        return f'<ul class="legend" aria-label="Branches">{items}</ul>'

    def bar(self, parts: Mapping[str, float]) -> str:
        """The branches' parts of a merged kernel, side by side.

        Args:
            parts: Branches -> their parts; those that others cancel are
                negative, and hatched.
        """
        finite = {n: p for n, p in parts.items() if math.isfinite(p)}
        whole = sum(map(abs, finite.values())) or 1
        text = ', '.join(f'{n} {100 * p:.0f} %' for n, p in finite.items())
        pieces = ''.join(
            f'<i {self.style(n, f";flex:{abs(p) / whole:.4f}")}'
            + (' class="minus"' if p < 0 else '')
            + f' title="{escape(n)}: {100 * p:.1f} %"></i>'
            for n, p in finite.items()
        )
        return (
            f'<div class="bar" role="img" aria-label="{escape(text)}">'
            f'{pieces}</div>'
        )

    def chart(self, layers: Mapping[str, Mapping[str, float]]) -> str:
        """All layers side by side, each a column of its branches' parts.

        Each column leads to the part of the page on its layer.

        Args:
            layers: Layers, in order -> branches -> their parts.
        """
        columns = []
        for place, (layer, parts) in enumerate(layers.items(), 1):
            finite = {n: p for n, p in parts.items() if math.isfinite(p)}
            text = ', '.join(f'{n} {100 * p:.0f} %' for n, p in finite.items())
            shown = escape(f'{layer or "the network"}: {text}')
            pieces = ''.join(
                f'<i {self.style(n, f";flex:{abs(p):.4f}")}'
                + (' class="minus"' if p < 0 else '')
                + '></i>'
                for n, p in finite.items()
            )
            columns.append(
                f'<a href="#layer-{place}" title="{shown}" '
                f'aria-label="{shown}">{pieces}</a>'
            )
        return f'<div class="columns">{"".join(columns)}</div>'

    def part(self, kind: str, share: float) -> str:
        """One branch's part as a short bar and a number."""
        whole = share if math.isfinite(share) else 0
        width = max(1, round(70 * min(max(whole, 0), 1)))
        return (
            f'<span class="part" {self.style(kind, f";width:{width}px")}>'
            f'</span>{percent(share).html}'
        )
