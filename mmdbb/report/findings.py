# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What stands out in a report, in sentences."""

from __future__ import annotations

import math
from typing import Iterator, List, NamedTuple, Tuple

from mmdbb.report.figures import BranchFigures, LayerFigures, Report

#: A branch is weak if the merged kernel moves by less than this share of its
#: length without it.
WEAK = 0.02
#: A branch is dead if none of its factors is larger.
DEAD = 1e-3
#: Below this ratio of signal to rounding noise, in decibels, a layer's weights
#: lose more than 3 % of their size in INT8.
NOISY = 30.0
#: How many names a sentence lists.
_LISTED = 3


class Finding(NamedTuple):
    """A sentence on the network.

    Attributes:
        kind: ``'good'``, ``'note'`` or ``'warning'``.
        text: The sentence, with names of layers in backticks.
    """

    kind: str
    text: str


def findings(report: Report) -> List[Finding]:
    """Say what stands out.

    Args:
        report: The figures.
    """
    return [*_of_merge(report), *_of_kinds(report), *_of_layers(report)]


def _of_merge(report: Report) -> Iterator[Finding]:
    proof = report.proof
    if not proof.equal:
        yield Finding(
            'warning',
            f'The merged network is not proven to be the same: '
            f'{proof.refused}.',
        )
    for name, reason in proof.left_out.items():
        yield Finding(
            'note', f'`{name}` was compared layer by layer only: {reason}.'
        )


def _of_kinds(report: Report) -> Iterator[Finding]:
    parts = {
        name: kind.projection
        for name, kind in report.kinds.items()
        if math.isfinite(kind.projection)
    }
    if len(parts) < 2:
        return
    most = max(parts, key=parts.__getitem__)
    least = min(parts, key=parts.__getitem__)
    layers = _layers(report.kinds[most].layers)
    yield Finding(
        'note',
        f'`{most}` supplies most of the merged kernels, '
        f'{_percent(parts[most])} on average over {layers}; `{least}` the '
        f'least, {_percent(parts[least])}.',
    )
    changes = {
        name: kind.network
        for name, kind in report.kinds.items()
        if kind.network is not None
    }
    if changes:
        least = min(changes, key=changes.__getitem__)
        text = (
            f'Without all `{least}` branches the outputs change by '
            f'{_percent(changes[least])}, less than without any other kind'
        )
        score = report.kinds[least].metric
        if score is not None and report.score is not None:
            text += f'; {report.metric}: {report.score:.4g} → {score:.4g}'
        yield Finding('note', f'{text}.')


def _of_layers(report: Report) -> Iterator[Finding]:
    branches = [
        (layer, name, branch)
        for layer in report.layers
        for name, branch in layer.branches.items()
    ]
    dead = [_at(x) for x in branches if _is_dead(x[2])]
    if dead:
        yield Finding(
            'warning',
            f'{_count(dead, "branch is", "branches are")} dead, all factors '
            f'below {DEAD:g}: {_some(dead)}.',
        )
    weak = [
        _at(x) for x in branches if x[2].share < WEAK and not _is_dead(x[2])
    ]
    if weak:
        yield Finding(
            'note',
            f'{_count(weak, "branch moves its", "branches move their")} merged'
            f' kernel by less than {_percent(WEAK)}: {_some(weak)}.',
        )
    against = [_at(x) for x in branches if x[2].projection < -WEAK]
    if against:
        yield Finding(
            'note',
            f'{_count(against, "branch points", "branches point")} against '
            f'the merged kernel, and the others make up for it: '
            f'{_some(against)}.',
        )
    zero = [
        f'`{layer.name}`'
        for layer in report.layers
        if not any(layer.range.channels)
    ]
    if zero:
        yield Finding(
            'warning',
            f'{_count(zero, "layer has", "layers have")} a merged kernel of '
            f'zeros, which gives the same for all images: {_some(zero)}.',
        )
    noisy = sorted(
        (layer for layer in report.layers if layer.range.snr < NOISY),
        key=lambda layer: layer.range.snr,
    )
    if noisy:
        lowest = noisy[0].range.snr
        names = [f'`{layer.name}`' for layer in noisy]
        yield Finding(
            'warning',
            f'{_count(names, "layer is", "layers are")} at risk in INT8, with '
            f'a signal-to-noise ratio of weights down to {lowest:.1f} dB: '
            f'{_some(names)}.',
        )
    elif len(zero) < len(report.layers):
        lowest = min(layer.range.snr for layer in report.layers)
        yield Finding(
            'good',
            'No layer stands out in INT8: with one scale a channel the '
            f'weights keep {lowest:.1f} dB or more of signal over rounding '
            'noise.',
        )


def _is_dead(branch: BranchFigures) -> bool:
    return branch.gammas is not None and branch.gammas.largest < DEAD


def _at(found: Tuple[LayerFigures, str, BranchFigures]) -> str:
    layer, name, _ = found
    return f'`{name}` of `{layer.name}`'


def _some(names: List[str]) -> str:
    text = ', '.join(names[:_LISTED])
    more = len(names) - _LISTED
    return f'{text} and {more} more' if more > 0 else text


def _count(names: List[str], one: str, many: str) -> str:
    return f'{len(names)} {one if len(names) == 1 else many}'


def _layers(count: int) -> str:
    return f'{count} layer' + 's' * (count > 1)


def _percent(share: float) -> str:
    return f'{100 * share:.3g} %'
