# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The page that says what the rows of a sweep mean."""

from __future__ import annotations

import datetime
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

import torch

from workshop.markers import put_between

from .packages import PACKAGES
from .run import Results
from .verdicts import Verdict, reason_of, verdict_of
from .whole import PACKAGE

#: The page, from the checkout's root.
PAGE = 'docs/hosts.md'
BEGIN = '<!-- tools/sweep.py writes what follows -->'
END = '<!-- tools/sweep.py wrote what stands above -->'


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
    body = '\n'.join(_body(list(Results(path).rows.values())))
    text = put_between(page.read_text('utf-8'), BEGIN, END, body, page)
    page.write_text(text, 'utf-8')
    return page


def _body(rows: List[dict]) -> Iterator[str]:
    packages = {r['package']: r for r in rows if r['key'].startswith(PACKAGE)}
    tried = [r for r in rows if not r['key'].startswith(PACKAGE)]
    yield from _heading(packages, tried)
    yield from _table(packages, tried)
    yield from _shares(tried)
    for verdict in (
        Verdict.FAILS,
        Verdict.WARNED,
        Verdict.REFUSED,
        Verdict.NOT_BUILT,
    ):
        chosen = [row for row in tried if verdict_of(row) is verdict]
        yield from _reasons(verdict, chosen)
    yield from _refused_parts(tried)
    yield from _left_out(tried)


def _heading(packages: Dict[str, dict], tried: List[dict]) -> Iterator[str]:
    versions = ', '.join(
        f'{name} {packages[name]["version"]}'
        for name in PACKAGES
        if 'version' in packages.get(name, {})
    )
    counts = Counter(row.get('commit', 'unknown') for row in tried)
    commits = ', '.join(
        f'{commit} ({number:,} architectures)'
        for commit, number in counts.most_common()
    )
    hours = sum(row.get('seconds', 0) for row in tried) / 3600
    yield (
        f'Written on {datetime.date.today()} by `tools/sweep.py`. What has a '
        f'result took {hours:.1f} hours of one core. Commit: {commits}. '
        f'Packages: torch {torch.__version__}, {versions}.'
    )
    known = sum(row.get('architectures', 0) for row in packages.values())
    if len(tried) < known:
        yield ''
        yield (
            f'**The run was cut: {len(tried):,} of {known:,} architectures '
            'have a result.** The others say nothing yet.'
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


#: What a package's own row has for the table.
_KNOWN = ('files', 'architectures')
_COLUMNS = (
    'package',
    'configs',
    'architectures',
    'tried',
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
            known = [packages[name][each] for each in _KNOWN]
            lines.append([*known, *_counts(rows)])
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


def _shares(tried: List[dict]) -> Iterator[str]:
    """The two numbers that the table is for, in words."""
    of = {verdict: [] for verdict in Verdict}
    for row in tried:
        of[verdict_of(row)].append(row)
    # What ended before it said so counts as if it got blocks.
    built = [
        row
        for verdict in _WITH_BLOCKS
        for row in of[verdict]
        if row['blocks'] or 'ended' in row
    ]
    if not built:
        return
    works, warned = len(of[Verdict.WORKS]), len(of[Verdict.WARNED])
    none = sum(
        row['steps']['builds']['ok'] and not row['blocks']
        for row in of[Verdict.REFUSED]
    )
    yield ''
    yield (
        f'Of {len(built):,} architectures that get blocks, {works:,} '
        f'({works / len(built):.1%}) train and become the stock network; with '
        f'the {warned:,} that were warned of and deploy in another form, '
        f'{(works + warned) / len(built):.1%} train and deploy. '
        f'{len(of[Verdict.REFUSED]):,} were refused before the training, '
        f'{none:,} of them because no convolution of theirs becomes a block.'
    )
    how = Counter(
        row['steps']['trains'].get('how')
        for row in built
        if 'trains' in row['steps']
    )
    yield ''
    yield (
        f'The step of training took the own loss of {how["loss"]:,}, the '
        f'features of {how["features"]:,}, in {how["blocks alone"]:,} each '
        'block by itself.'
    )


#: What can come of an architecture that has blocks.
_WITH_BLOCKS = (
    Verdict.WORKS,
    Verdict.WARNED,
    Verdict.REFUSED,
    Verdict.FAILS,
)


def _left_out(tried: List[dict]) -> Iterator[str]:
    """Parts that could not be run for the comparison after merging."""
    rows = [row for row in tried if _not_compared(row)]
    merged = [
        row
        for row in tried
        if verdict_of(row) in (Verdict.WORKS, Verdict.WARNED)
    ]
    if not merged:
        return
    yield ''
    yield '## Parts that were not compared as a whole'
    yield ''
    yield (
        f'In {len(rows):,} of {len(merged):,} merged architectures a part '
        'could not be run on features, nor with the whole network on random '
        'images. Their blocks were compared one by one, each with the norm '
        'behind it.'
    )
    groups: Dict[str, List[str]] = defaultdict(list)
    for row in rows:
        name = f'`{row["package"]}::{row["config"]}`'
        groups[', '.join(sorted(_not_compared(row)))].append(name)
    if groups:
        yield ''
        yield '| parts | architectures |'
        yield '|---|---|'
    for parts, names in sorted(groups.items()):
        yield f'| {_escaped(parts)} | {len(names)}: {", ".join(names)} |'


def _not_compared(row: dict) -> Dict[str, str]:
    """Name of a part that was left out of the comparison -> the reason."""
    if verdict_of(row) not in (Verdict.WORKS, Verdict.WARNED):
        return {}
    step = row['steps']['merges']
    step = step if step['ok'] else row['steps']['fuses']
    return step.get('left_out', {})


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
        if 'ended' not in row:  # there the number is the limit
            reason = re.sub(r"[\w.]*\d[\w.]*|'[^']*'", '...', reason)
        groups[reason].append(row)
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
