# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The study's file: a row for each training, with all of its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing


class Training(NamedTuple):
    """One training: what decides its result.

    Attributes:
        network: One of :data:`~workshop.study.networks.NETWORKS`.
        width: Channels of its first stage.
        block: Name of the block in tables.
        size: Training images a class.
        seed: Of the images, the weights, the order and the crops.
        role: ``'search'`` for one that settings are chosen by, counted on
            held-out training images; ``'test'``; ``'same time'`` for one
            that may take as long as the baseline's.
        lr: Largest learning rate.
        epochs: Passes over the images, perhaps a part of one.
        batch: Images in a step.
        machine: Device and precision.
    """

    network: str
    width: int
    block: str
    size: int
    seed: int
    role: str
    lr: float
    epochs: float
    batch: int
    machine: str


class Row(NamedTuple):
    """A training and what came of it.

    Attributes:
        training: Its settings.
        top1: Accuracy of the merged network in per cent: on the 5,000
            held-out images if its role is ``'search'``, else on the 10,000
            test images.
        seconds: Of all training steps; on a CPU, of computing.
        branches: Of all blocks together, where some may have been dropped;
            else None, and not in the file.
    """

    training: Training
    top1: float
    seconds: float
    branches: Optional[int] = None


class Cost(NamedTuple):
    """What a training step of a block costs.

    Attributes:
        network: The network.
        width: Channels of its first stage.
        block: Name of the block.
        batch: Images in the step.
        machine: Device and precision.
        milliseconds: Median over steps, taken in turns with the other
            blocks.
        megabytes: Counted, see :func:`~workshop.study.training.megabytes`.
    """

    network: str
    width: int
    block: str
    batch: int
    machine: str
    milliseconds: float
    megabytes: float


class Record(NamedTuple):
    """All that is known.

    Attributes:
        rows: Trainings.
        costs: Costs of steps.
    """

    rows: List[Row]
    costs: List[Cost]

    def find(self, training: Training) -> Optional[Row]:
        """The row of a training, None if it has not been run."""
        for row in self.rows:
            if row.training == training:
                return row
        return None

    def replace(self, row: Row) -> None:
        """Add a row, in the place of one of the same training."""
        others = [r for r in self.rows if r.training != row.training]
        self.rows[:] = [*others, row]


def read_record(path: Path) -> Record:
    """Read a study's file.

    Raises:
        UserError: If it holds something else.
    """
    try:
        report = json.loads(path.read_text())
        rows, costs = [], [Cost(**fields) for fields in report.pop('costs')]
        for fields in report.pop('rows'):
            top1, seconds = (fields.pop(n) for n in ('top1', 'seconds'))
            branches = fields.pop('branches', None)
            rows.append(
                Row(Training(**fields), float(top1), float(seconds), branches)
            )
        if report:
            raise KeyError(*report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path} holds no results of this study; choose another name'
        ) from error
    return Record(rows, costs)


def write_record(path: Path, record: Record) -> None:
    """Write a study's file, a row in a line."""
    rows = [_fields_of(row) for row in record.rows]
    costs = [cost._asdict() for cost in record.costs]
    text = f'{{"costs": {_lines(costs)},\n"rows": {_lines(rows)}}}\n'
    with all_or_nothing(str(path), overwrite=True) as drafts:
        Path(drafts[0]).write_text(text)


def _fields_of(row: Row) -> dict:
    training, top1, seconds, branches = row
    fields = dict(training._asdict(), top1=top1, seconds=seconds)
    return fields if branches is None else dict(fields, branches=branches)


def _lines(items: List[dict]) -> str:
    inside = ',\n'.join(json.dumps(item) for item in items)
    return f'[\n{inside}\n]' if items else '[]'


def rounded(top1: float, seconds: float) -> Tuple[float, float]:
    """As many digits as mean something, so that the file stays small."""
    return round(top1, 3), round(seconds, 2)
