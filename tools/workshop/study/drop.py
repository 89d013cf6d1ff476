# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What a trained network loses when branches with small shares are dropped.

Branches are dropped folded, as ``tools/branches.py`` does it, or cut: taken
out and nothing else, as one would by hand. Each is tested as it is, and after
all networks were trained on for as long, with all branches or those left.
"""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from torch import nn

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.drop_branches import drop_branches_, weak_branches
from mmdbb.mm.engine.measure import print_table
from mmdbb.reparam import find_blocks
from workshop.study.plan import Cell
from workshop.study.report import compared, gains, interval
from workshop.study.rows import Record
from workshop.study.training import merged, top1
from workshop.study.variants import Part

#: Largest shares of what is dropped: 2, 8 and 20 of the 21 branches besides
#: ``kxk`` of the network that DBB's search chose at 30 images a class. At
#: 0.05 it would lose none.
THRESHOLDS = (0.2, 0.35, 0.5)
#: Roles that others are compared with.
WHOLE, TRAINED_ON = 'all branches', 'all branches, trained on'


class Left(NamedTuple):
    """What is left of a network.

    Attributes:
        top1: Accuracy on the test images, per cent.
        branches: How many its blocks have together; None if nobody counted.
    """

    top1: float
    branches: Optional[int]


def count_branches(network: nn.Module) -> int:
    """Branches of a network's blocks that sum branches."""
    return sum(
        len(block.branches)
        for block in find_blocks(network).values()
        if isinstance(block, BranchSumConv2d)
    )


def after_dropping(
    trained,
    threshold: float = -1.0,
    fold: bool = True,
    train_on: bool = False,
) -> Left:
    """Drop branches of a copy, and test it.

    Args:
        trained: A :class:`~workshop.study.follow.Trained` network.
        threshold: Largest share of what is dropped; negative for nothing.
        fold: Whether what is dropped is folded into the ``kxk`` branches.
        train_on: Whether the copy is trained on before it is tested.
    """
    network = copy.deepcopy(trained.network)
    if threshold >= 0:
        drop_branches_(network, weak_branches(network, threshold), fold)
    if train_on:
        trained.train_on(network)
    return Left(
        top1(merged(network), trained.data.test), count_branches(network)
    )


def _role(threshold: float, fold: bool, train_on: bool) -> str:
    kind = 'folded' if fold else 'cut'
    return f'{threshold:g} {kind}{", trained on" if train_on else ""}'


#: Whether branches are folded, and their largest share.
_KINDS = [*itertools.product((True, False), THRESHOLDS)]
#: Role of a row -> what is done.
ROLES: Dict[str, Callable[..., Left]] = {
    WHOLE: after_dropping,
    **{
        _role(threshold, fold, False): partial(
            after_dropping, threshold=threshold, fold=fold
        )
        for fold, threshold in _KINDS
    },
    TRAINED_ON: partial(after_dropping, train_on=True),
    **{
        _role(threshold, fold, True): partial(
            after_dropping, threshold=threshold, fold=fold, train_on=True
        )
        for fold, threshold in _KINDS
    },
}


def compared_with(role: str) -> Optional[str]:
    """The role that a role's accuracies are compared with, if there is one.

    What was trained on after dropping is compared with what was trained on
    with all branches.
    """
    if role == WHOLE:
        return None
    longer = role.endswith('trained on') and role != TRAINED_ON
    return TRAINED_ON if longer else WHOLE


HEADER = ('block', 'branches', 'left', 'top-1 (%)', 'change', 'seeds')


def print_drops(
    record: Record, cells: Sequence[Cell], part: Part, roles: Sequence[str]
) -> None:
    """Print a table for each cell that has results."""
    for cell in cells:
        lines = drops(record, cell, part, roles)
        if lines:
            print_table(
                HEADER,
                lines,
                f'change: to {WHOLE!r}, or of what was trained on to '
                f'{TRAINED_ON!r}, seed by seed; ± is half of a 95 % '
                'confidence interval',
                cell.title,
            )


def drops(
    record: Record, cell: Cell, part: Part, roles: Sequence[str]
) -> List[Tuple[str, ...]]:
    """The lines of that table: a line for each block and role."""
    found = {role: compared(record, cell, part, role) for role in roles}
    lines = []
    for block in part.blocks:
        for role in filter(lambda role: block in found[role], roles):
            rows = found[role][block]
            base = compared_with(role)
            change = gains(rows, found[base].get(block, {})) if base else None
            left = [r.branches for r in rows.values() if r.branches]
            lines.append(
                (
                    block,
                    role,
                    f'{sum(left) / len(left):.1f}' if left else '',
                    interval([r.top1 for r in rows.values()]).text(),
                    change.text('+') if change else '',
                    str(len(rows)),
                )
            )
    return lines
