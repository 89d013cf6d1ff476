# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The figure of an evaluator that is watched, and how far it may fall.

An evaluator's numbers carry no unit: some are per cent, some are shares of 1,
some are metres or counts, and for some less is better. The name tells only
where it is one of :data:`FIGURES`. Anything else is compared in the way that
lets least pass, until the caller says more.
"""

from __future__ import annotations

import math
from typing import Dict, NamedTuple, Optional

from mmdbb.errors import UserError

#: What a figure may be: a share of 1, or points (hundredths, per cent).
UNITS = ('share', 'points')
#: The main figures of the evaluators for classes, boxes and segments, in the
#: unit in which they are printed. More is better.
FIGURES: Dict[str, str] = {
    'accuracy/top1': 'points',
    'coco/bbox_mAP': 'share',
    'mIoU': 'points',
}


class Metric(NamedTuple):
    """Which figure of an evaluator to watch, and what it is.

    Attributes:
        name: The evaluator's name for it; None for its main figure.
        unit: One of :data:`UNITS`. With None, the figures of
            :data:`FIGURES` have the unit given there; others have none, and
            are compared relatively.
        lower_is_better: Whether the figure is an error. With None, more is
            better for the figures of :data:`FIGURES`; of others a change in
            either direction counts as a fall.
    """

    name: Optional[str] = None
    unit: Optional[str] = None
    lower_is_better: Optional[bool] = None

    def check(self) -> None:
        """Raise a UserError if the unit is unknown."""
        if self.unit not in (None, *UNITS):
            raise UserError(
                f'the unit must be one of {", ".join(UNITS)}; got '
                f'{self.unit!r}'
            )

    def of(self, name: str, value: float) -> Metric:
        """Fill in what the figure's name and its first value tell.

        Args:
            name: The evaluator's name for the figure.
            value: Its value for the first network.
        """
        unit, worse = self.unit, self.lower_is_better
        if unit is None and name in FIGURES:
            unit = FIGURES[name]
            # Another evaluator may print shares under this name.
            if 0 <= value <= 1:
                unit = 'share'
        if worse is None and name in FIGURES:
            worse = False
        return Metric(name, unit, worse)


class Figure(NamedTuple):
    """One number of an evaluator.

    Attributes:
        metric: What the number is; its ``name`` is set.
        value: The number, as the evaluator gives it.
    """

    metric: Metric
    value: float

    @property
    def name(self) -> str:
        """The evaluator's name for the number."""
        return self.metric.name

    @property
    def points(self) -> float:
        """The number in points; if its unit is not known, as it is."""
        return self.value * (100 if self.metric.unit == 'share' else 1)

    @property
    def title(self) -> str:
        """The name, for a table: with the unit, if it is known."""
        unit = 'unit unknown' if self.metric.unit is None else 'points'
        return f'{self.name} ({unit})'


def fall(first: Figure, last: Figure) -> float:
    """How much worse a figure has become.

    Args:
        first: The figure before.
        last: The same figure after; it is measured as ``first``'s metric
            says.

    Returns:
        float: In points; if the unit is not known, in per cent of ``first``;
        rounded to four decimals. Negative if the figure has become better,
        NaN if one is no number.
    """
    metric = first.metric
    lost = first.points - last._replace(metric=metric).points
    if metric.lower_is_better is None:
        lost = abs(lost)
    elif metric.lower_is_better:
        lost = -lost
    if metric.unit is None and lost:
        lost *= 100 / abs(first.value) if first.value else math.inf
    # Evaluators count in single precision: 93.3 - 93 is 0.300003 there.
    return round(lost, 4)


def describe_fall(first: Figure, last: Figure) -> str:
    """Say from where to where a figure fell, in which unit.

    Args:
        first: The figure before.
        last: The same figure after.
    """
    metric, lost = first.metric, fall(first, last)
    verb = {True: 'rises', False: 'falls', None: 'changes'}
    unit = 'points' if metric.unit else 'per cent of its value'
    after = last._replace(metric=metric).points
    text = (
        f'{first.name} {verb[metric.lower_is_better]} by {lost:.2f} {unit}, '
        f'from {first.points:.4g} to {after:.4g}'
    )
    unknown = []
    if metric.unit is None:
        unknown.append('its unit (--unit share or points)')
    if metric.lower_is_better is None:
        unknown.append(
            'what is better (--lower-is-better or --higher-is-better)'
        )
    if unknown:
        text += f' (nothing says {" nor ".join(unknown)})'
    return text
