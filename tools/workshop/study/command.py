# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run a study from a command's arguments, and print its tables."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import torch

from mmdbb.errors import UserError
from mmdbb.mm.engine.measure import check_picture, report_files
from workshop.study import task_plan
from workshop.study.drop import print_drops
from workshop.study.follow import FOLLOW_UPS
from workshop.study.page import CELLS, RESULTS, write_page
from workshop.study.picture import draw_study
from workshop.study.plan import Cell, cells_for
from workshop.study.report import print_follow_ups, print_study
from workshop.study.rows import Row, read_record
from workshop.study.run import Plan, run_study
from workshop.study.task_tables import print_tasks
from workshop.study.tasks import run_tasks
from workshop.study.training import Machine
from workshop.study.variants import PARTS, Part

#: The folder that holds ``configs``.
HOME = Path(__file__).resolve().parents[3]


class _Study(NamedTuple):
    """What is run and shown.

    Attributes:
        rows: Runs what is missing, and gives what it found.
        cells: What a table is made for.
        part: What is compared.
        roles: What is done with trained networks, if anything.
    """

    rows: Iterator[Row]
    cells: Sequence[Cell]
    part: Part
    roles: Sequence[str]


def run_command(args: argparse.Namespace) -> None:
    """Run what ``tools/study.py`` was asked for.

    Args:
        args: The tool's arguments.

    Raises:
        UserError: If a file cannot be written or holds something else, or a
            name is unknown.
    """
    check_picture(args.plot)
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # mmengine lists all weights at the start
    out = Path(args.out)
    if args.docs and out.resolve() != HOME / RESULTS:
        raise UserError(f'--docs is for --out {RESULTS}, got {args.out}')
    with report_files(args.plot, overwrite=args.force) as (plot,):
        study = (_tasks if args.part == 'tasks' else _fashion)(args, out)
        for row in study.rows:
            print(_line(row), flush=True)
        record = read_record(out)
        if plot:
            cells = CELLS if args.docs else study.cells
            draw_study(record, cells, study.part, plot)
    if args.part == 'tasks':
        print_tasks(record, study.cells, study.part)
    elif args.part == 'drop':
        print_drops(record, study.cells, study.part, study.roles)
    elif study.roles:
        print_follow_ups(record, study.cells, study.part, study.roles)
    else:
        print_study(record, study.cells, study.part)
    if args.docs:
        print(write_page(HOME, record))


def _line(row: Row) -> str:
    t = row.training
    return (
        f'{t.network}, {t.size} a class, {t.block}, {t.role} {t.seed}, rate '
        f'{t.lr:g}, {t.epochs:g} epochs: {row.top1:.2f} %, {row.seconds:.1f} s'
    )


def _fashion(args: argparse.Namespace, out: Path) -> _Study:
    machine = Machine(
        torch.device(args.device),
        args.precision,
        args.graphs,
        args.channels_last,
    )
    part = _chosen(args, PARTS[args.part])
    cells = cells_for(
        args.networks,
        args.sizes,
        machine.name,
        width=args.width,
        batch=args.batch,
        epochs=args.epochs,
    )
    roles = FOLLOW_UPS.get(args.part, {})
    data_root = args.data_root or 'data/fashion_mnist'
    plan = Plan(data_root, cells, part, args.seeds, machine, roles)
    rows = run_study(plan, out, args.minutes, args.jobs)
    return _Study(rows, cells, part, [*roles])


def _tasks(args: argparse.Namespace, out: Path) -> _Study:
    part, names = (
        _chosen(args, task_plan.PART),
        args.networks or [*task_plan.NETWORKS],
    )
    plan = task_plan.TaskPlan(
        HOME, args.data_root or 'data', names, part, args.seeds
    )
    cells = [
        task_plan.cell_of(name, task_plan.base_config(HOME, name))
        for name in names
        if name in task_plan.NETWORKS
    ]
    return _Study(run_tasks(plan, out, args.minutes), cells, part, [])


def _chosen(args: argparse.Namespace, part: Part) -> Part:
    return part._replace(blocks=tuple(args.blocks)) if args.blocks else part
