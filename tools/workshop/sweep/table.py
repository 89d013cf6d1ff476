# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What the rows of a sweep mean, and the page that says it."""

from __future__ import annotations

import datetime
import enum
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import torch

from mmdbb.errors import UserError

from .packages import PACKAGES
from .run import Limits, Results, find_architectures, sweep

#: The page, from the checkout's root.
PAGE = 'docs/hosts.md'
BEGIN = '<!-- tools/sweep.py writes what follows -->'
END = '<!-- tools/sweep.py wrote what stands above -->'
#: Key of a package's own row.
_PACKAGE = 'package '


class Verdict(enum.Enum):
    """What came of an architecture. The values are the words of the page."""

    WORKS = 'trains, starts, merges'
    SAID = 'said before training'
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
        return Verdict.SAID
    warned = any(_NO_PLACE in line for line in steps.get('says', {})['said'])
    others = [name for name in _MUST if name != 'merges']
    works = all(steps.get(name, {}).get('ok') for name in others)
    fuses = steps.get('fuses', {}).get('ok')
    return Verdict.SAID if warned and works and fuses else Verdict.FAILS


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


def sweep_packages(
    packages: Sequence[str],
    path: Path,
    limits: Limits,
    only: str = '',
    every: int = 1,
) -> Iterator[str]:
    """Try the architectures of packages.

    Args:
        packages: Import names.
        path: The file of the rows; what it has already is not tried again.
        limits: What each architecture may use.
        only: Text that the config or the classes must have.
        every: Try each architecture of this number only, for a quick look.

    Yields:
        str: A line for each package and each new row.
    """
    results = Results(path)
    wanted = []
    for package in packages:
        try:
            found, notes = find_architectures(package, limits)
        except UserError as error:
            results.add(
                dict(
                    key=_PACKAGE + package, package=package, absent=str(error)
                )
            )
            yield str(error)
            continue
        results.add(dict(key=_PACKAGE + package, **notes))
        chosen = [a for a in found if only in a.config or only in a.key]
        yield (
            f'{package} {notes["version"]}: {notes["files"]} configs, '
            f'{len(found)} architectures'
        )
        wanted += chosen
    for row in sweep(wanted[::every], results, limits):
        yield line_of(row)


def line_of(row: Dict[str, Any]) -> str:
    """A row in a line of text."""
    reason = reason_of(row)
    blocks = sum(row['blocks'].values())
    return (
        f'{row["package"]} {row["config"]}: {verdict_of(row).value}, '
        f'{blocks} blocks, {row.get("seconds", 0)} s'
        + (f': {reason}' if reason else '')
    )


def write_page(root: Path, path: Path) -> Path:
    """Write the results between the markers of `docs/hosts.md`.

    Args:
        root: The checkout.
        path: The file of the rows.

    Returns:
        Path: The page.

    Raises:
        UserError: If the page has no markers.
    """
    page = root / PAGE
    text = page.read_text(encoding='utf-8')
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f'{page} needs the lines {BEGIN!r} and {END!r}')
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    rows = list(Results(path).rows.values())
    body = '\n'.join(_body(rows, root))
    page.write_text(f'{head}{BEGIN}\n\n{body}\n\n{END}{tail}', 'utf-8')
    return page


def _body(rows: List[dict], root: Path) -> Iterator[str]:
    packages = {r['package']: r for r in rows if r['key'].startswith(_PACKAGE)}
    tried = [r for r in rows if not r['key'].startswith(_PACKAGE)]
    yield from _heading(packages, root)
    yield from _table(packages, tried)
    for verdict in (Verdict.FAILS, Verdict.SAID, Verdict.NOT_BUILT):
        chosen = [row for row in tried if verdict_of(row) is verdict]
        yield from _reasons(verdict, chosen)
    yield from _refused_parts(tried)


def _heading(packages: Dict[str, dict], root: Path) -> Iterator[str]:
    versions = ', '.join(
        f'{name} {packages[name]["version"]}'
        for name in PACKAGES
        if 'version' in packages.get(name, {})
    )
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'],
        cwd=root,
        capture_output=True,
        text=True,
    ).stdout.strip()
    yield (
        f'Run on {datetime.date.today()} at commit {commit} by '
        f'`make sweep-hosts`, with torch {torch.__version__}, {versions}.'
    )
    lifted = [name for name in packages if packages[name].get('lifted')]
    if lifted:
        yield ''
        yield (
            f'By their own checks {", ".join(lifted)} refuse the versions of '
            'the other packages here. They were imported without these '
            'checks, so their rows say what the networks do, not that such '
            'an installation is supported.'
        )
    for name, package in packages.items():
        if 'absent' in package:
            yield ''
            yield f'{name} was not tried: {package["absent"]}.'


_COLUMNS = (
    'package',
    'configs',
    'architectures',
    'take `conv_cfg`',
    'blocks',
    *(verdict.value for verdict in Verdict),
)


def _table(packages: Dict[str, dict], tried: List[dict]) -> Iterator[str]:
    yield ''
    yield f'| {" | ".join(_COLUMNS)} |'
    yield '|' + '---|' * len(_COLUMNS)
    lines = []
    for name in PACKAGES:
        if 'version' in packages.get(name, {}):
            rows = [row for row in tried if row['package'] == name]
            lines.append([packages[name]['files'], *_counts(rows)])
            yield f'| {name} | {_numbers(lines[-1])} |'
    yield f'| all | {_numbers([sum(column) for column in zip(*lines)])} |'


def _counts(rows: List[dict]) -> List[int]:
    verdicts = Counter(verdict_of(row) for row in rows)
    return [
        len(rows),
        sum(bool(row['takes']) for row in rows),
        sum(sum(row['blocks'].values()) for row in rows),
        *(verdicts[verdict] for verdict in Verdict),
    ]


def _numbers(values: Sequence[int]) -> str:
    return ' | '.join(f'{value:,}' for value in values)


def _reasons(verdict: Verdict, rows: List[dict]) -> Iterator[str]:
    """The architectures of a verdict, those with the same reason together."""
    if not rows:
        return
    yield ''
    yield f'## {verdict.value[0].upper()}{verdict.value[1:]}: {len(rows)}'
    groups: Dict[str, List[dict]] = defaultdict(list)
    for row in rows:
        reason = reason_of(row)
        groups[re.sub(r"[\w.]*\d[\w.]*|'[^']*'", '...', reason)].append(row)
    for group in sorted(groups.values(), key=len, reverse=True):
        names = [f'`{row["package"]}::{row["config"]}`' for row in group]
        yield ''
        yield f'- {_escaped(reason_of(group[0]))}'
        yield f'  ({len(names)}: {", ".join(names)})'


def _refused_parts(tried: List[dict]) -> Iterator[str]:
    """Parts that stay plain in architectures whose other parts have blocks."""
    groups: Dict[str, set] = defaultdict(set)
    for row in tried:
        for where, reason in row['refused'].items():
            groups[reason].add(row['takes'][where])
    if groups:
        yield ''
        yield '## Parts that cannot be built with blocks'
        yield ''
        yield 'The other parts of their networks were tried with blocks.'
        yield ''
        yield '| part | reason |'
        yield '|---|---|'
    for reason, kinds in sorted(groups.items()):
        names = ', '.join(f'`{kind}`' for kind in sorted(kinds))
        yield f'| {names} | {_escaped(reason)} |'


def _escaped(text: str) -> str:
    return re.sub(r'([|<>*_\[\]`])', r'\\\1', text)
