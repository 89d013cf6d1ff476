# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Sweep whole packages, and go on where a run was cut."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Iterator, Sequence

from mmdbb.errors import UserError

from .run import Limits, Results, find_architectures, sweep
from .verdicts import Verdict, line_of, verdict_of

#: Key of a package's own row, before its name.
PACKAGE = 'package '


def sweep_packages(
    packages: Sequence[str],
    path: Path,
    limits: Limits,
    only: str = '',
    every: int = 1,
    again: bool = False,
) -> Iterator[str]:
    """Try the architectures of packages.

    Args:
        packages: Import names.
        path: The file of the rows; what it has already is not tried again.
        limits: What each architecture may use.
        only: Text that the config or the classes must have.
        every: Try each architecture of this number only, for a quick look.
        again: Try those that have failed so far again.

    Yields:
        str: A line for each package and each new row.
    """
    results = Results(path)
    commit = commit_of(Path(__file__).parent)
    if again:
        for key, row in [*results.rows.items()]:
            if 'steps' in row and verdict_of(row) is Verdict.FAILS:
                del results.rows[key]
    wanted = []
    for package in packages:
        try:
            found, notes = find_architectures(package, limits)
        except UserError as error:
            results.add(
                dict(key=PACKAGE + package, package=package, absent=str(error))
            )
            yield str(error)
            continue
        results.add(dict(key=PACKAGE + package, **notes))
        chosen = [a for a in found if only in a.config or only in a.key]
        yield (
            f'{package} {notes["version"]}: {notes["files"]} configs, '
            f'{len(found)} architectures'
        )
        wanted += chosen
    for row in sweep(wanted[::every], results, limits, commit):
        yield line_of(row)


def commit_of(folder: Path) -> str:
    """The commit that is checked out, with '-dirty' if files differ from it.

    Args:
        folder: Any folder of the checkout.
    """
    return subprocess.run(
        ['git', 'describe', '--always', '--dirty', '--exclude=*'],
        cwd=folder,
        capture_output=True,
        text=True,
    ).stdout.strip()
