# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What a training step of each block costs."""

from __future__ import annotations

import functools
import statistics
from typing import Callable, Dict, List, Sequence

import torch

from workshop.study.images import Images
from workshop.study.networks import start_with
from workshop.study.plan import Cell, cost_of
from workshop.study.rows import Cost, Record
from workshop.study.training import Machine, Recipe, megabytes, train
from workshop.study.variants import BLOCKS, PLAIN

#: Steps that a cost is the median of, after three to warm up.
_COST_STEPS = 15


def add_costs(
    cell: Cell,
    blocks: Sequence[str],
    record: Record,
    images: Images,
    machine: Machine,
) -> None:
    """Measure the blocks that a cell's costs lack, and plain with them.

    Args:
        cell: The network and its batch.
        blocks: What is compared.
        record: Gets the costs.
        images: At least a batch of images, on the machine's device.
        machine: Where to train.
    """
    missing = [b for b in blocks if cost_of(record, cell, b) is None]
    if not missing:
        return
    measured = list(dict.fromkeys([PLAIN, *missing]))
    found = _costs(cell, measured, images, machine)
    known = cost_of(record, cell, PLAIN)
    # On another day the machine has another speed; plain's tells by how much.
    factor = known.milliseconds / found[PLAIN].milliseconds if known else 1
    record.costs.extend(
        found[block]._replace(
            milliseconds=round(factor * found[block].milliseconds, 2)
        )
        for block in missing
    )


def _costs(
    cell: Cell, blocks: List[str], images: Images, machine: Machine
) -> Dict[str, Cost]:
    batch = cell.schedule.batch
    count = min(batch, len(images.labels))  # as training does
    steps: Dict[str, Callable[[], float]] = {}
    memory = {}
    for block in blocks:
        network = machine.take(
            start_with(cell.network, BLOCKS[block].config, cell.width, 0)
        )
        memory[block] = megabytes(network, images, batch)
        few = images.take(torch.arange(count, device=machine.device))
        steps[block] = functools.partial(
            train, network, few, Recipe(0.0, 1, batch), 0, machine
        )
    seconds: Dict[str, List[float]] = {block: [] for block in blocks}
    for i in range(_COST_STEPS + 3):
        for block, step in steps.items():
            taken = step()
            if i >= 3:
                seconds[block].append(taken)
    return {
        block: Cost(
            cell.network,
            cell.width,
            block,
            batch,
            cell.machine,
            1e3 * statistics.median(seconds[block]),
            round(memory[block], 3),
        )
        for block in blocks
    }
