# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What the row of an architecture means."""

from __future__ import annotations

import enum
from typing import Any, Dict


class Verdict(enum.Enum):
    """What came of an architecture. The values are the words of the page."""

    WORKS = 'trains, starts, merges'
    WARNED = 'merges in another form, as said'
    REFUSED = 'refused before training'
    FAILS = 'fails'
    NOT_BUILT = 'cannot be built here'
    NOT_TAKEN = 'takes no `conv_cfg`'


def verdict_of(row: Dict[str, Any]) -> Verdict:
    """What came of an architecture.

    Args:
        row: Its row, as :class:`~workshop.sweep.trial.Trial` describes it.
    """
    steps = row['steps']
    if 'ended' in row:
        return Verdict.FAILS
    if not row['takes']:
        return Verdict.NOT_TAKEN
    if not steps['alone']['ok']:
        return Verdict.NOT_BUILT
    if all(steps.get(name, {}).get('ok') for name in _MUST):
        return Verdict.WORKS
    # What the user can put right, before the first step of training.
    refused = [steps.get(n, {}).get('kind') for n in ('builds', 'says')]
    if 'refused' in refused:
        return Verdict.REFUSED
    said = steps.get('says', {}).get('said', ())
    warned = any(_NO_PLACE in line for line in said)
    needed = [name for name in _MUST if name != 'merges'] + ['fuses']
    works = all(steps.get(name, {}).get('ok') for name in needed)
    return Verdict.WARNED if warned and works else Verdict.FAILS


#: The steps that make an architecture work.
_MUST = ('builds', 'says', 'trains', 'starts', 'merges')
#: In the warning that a stock network cannot hold what blocks learn.
_NO_PLACE = 'have no place in the stock network'


def reason_of(row: Dict[str, Any]) -> str:
    """Why an architecture does not work, in a line; empty if it does."""
    if 'ended' in row:
        return row['ended']
    for name in ('alone', *_MUST, 'fuses'):
        step = row['steps'].get(name)
        if step is not None and not step['ok']:
            where = f' ({step["where"]})' if 'where' in step else ''
            return f'{name}: {step.get("reason", "")}{where}'
    return ''


def line_of(row: Dict[str, Any]) -> str:
    """A row in a line of text."""
    reason = reason_of(row)
    blocks = sum(row['blocks'].values())
    return (
        f'{row["package"]} {row["config"]}: {verdict_of(row).value}, '
        f'{blocks} blocks, {row.get("seconds", 0)} s'
        + (f': {reason}' if reason else '')
    )
