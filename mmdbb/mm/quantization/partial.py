# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Search for few layers that stay in float, so that a budget is met."""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Sequence


class Trial(NamedTuple):
    """One network that was tried.

    Attributes:
        kept: Names of the layers that stayed in float for the budget.
        drop: How much the evaluator's figure fell, in points (hundredths);
            if its unit is not known, in per cent.
    """

    kept: List[str]
    drop: float


def fewest_in_float(
    order: Callable[[], Sequence[str]],
    trial: Callable[[List[str]], float],
    budget: float,
) -> List[Trial]:
    """Halve the list of sensitive layers until the budget is just met.

    The layers are kept in float in the order given. Among its beginnings one
    is found that meets the budget while the next shorter one does not. A
    shorter one still may meet it by chance, because a figure does not fall
    evenly.

    Args:
        order: Gives the names of the layers, the most sensitive one first;
            called only if the budget is not met without it.
        trial: Takes the names of the layers to keep in float, quantizes all
            others, and returns how much the figure falls.
        budget: Largest fall allowed, in the same unit.

    Returns:
        list: The trials in the order they were made, but the best at the end:
        the one with the fewest layers that meets the budget. If even the
        network without integers falls by more, that one stands at the end.

    Examples:
        >>> trials = fewest_in_float(
        ...     lambda: 'abcd', lambda kept: 3 - len(kept), 1
        ... )
        >>> [(len(trial.kept), trial.drop) for trial in trials]
        [(0, 3), (4, -1), (1, 2), (2, 1)]
    """
    trials: List[Trial] = []

    def meets(kept: Sequence[str]) -> bool:
        trials.append(Trial(list(kept), trial(list(kept))))
        return trials[-1].drop <= budget  # not if the figure is no number

    if meets([]):
        return trials
    names = order()
    if not names or not meets(names):
        return trials
    low, high, best = 0, len(names), trials[-1]
    while high - low > 1:
        middle = (low + high) // 2
        if meets(names[:middle]):
            high, best = middle, trials[-1]
        else:
            low = middle
    return [t for t in trials if t is not best] + [best]
