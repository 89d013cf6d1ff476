# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which checkpoint an interrupted training goes on from.

mmengine follows the file ``last_checkpoint``, whatever it says. A process
that is killed can leave it empty, or before what it names is whole. So here
the checkpoints themselves are asked, the newest first.
"""

from __future__ import annotations

import os
import re
from string import Formatter
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import HistoryBuffer

from mmdbb.checkpoint.host_loading import load_from_local
from mmdbb.checkpoint.sources import some
from mmdbb.engine.whole_checkpoints import checkpoint_folder
from mmdbb.errors import UserError

#: mmengine's, which only says where else to look.
POINTER = 'last_checkpoint'
TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth')


def newest_whole_checkpoint(config: Config) -> Optional[str]:
    """The newest checkpoint of a work folder that is whole.

    Says on stdout which it is, and why not a newer one.

    Args:
        config: With ``work_dir``.

    Returns:
        str: Its path; None if the folder has no checkpoint at all.

    Raises:
        UserError: If there are some, but none is whole, or known to be one
            of a training by its name.
    """
    hook = _checkpoint_hook(config)
    folder = checkpoint_folder(config.work_dir, hook.get('out_dir'))
    template = hook.get('filename_tmpl') or TEMPLATES[0]
    folders = [folder, os.path.join(folder, os.path.dirname(template))]
    pointed = _pointed(config.work_dir)
    if pointed:
        folders.append(os.path.dirname(pointed))
    folders = list({os.path.realpath(f): f for f in folders[::-1]}.values())
    folders.reverse()
    found = _checkpoints(folders, [template, *TEMPLATES], pointed)
    reasons = []
    for path in found:
        try:
            check_resumable(
                load_from_local(path), path, saves_optimizer(config)
            )
        except UserError as error:
            reasons.append(str(error))
            continue
        if is_main_process():
            for reason in reasons:
                print(f'passed over: {reason}')
            if pointed and os.path.realpath(pointed) != os.path.realpath(path):
                print(f'{POINTER} names another one, or none: {pointed}')
            print(f'resuming from {path}')
        return path
    where = ' and '.join(folders)
    if found:
        raise UserError(
            f'none of the checkpoints in {where} is whole: '
            f'{"; ".join(reasons)}; to start over, choose another --work-dir'
        )
    others = _others(folders, config.get('load_from'))
    if others or pointed:
        names = some(others, 9) if others else f'gone is {pointed}'
        raise UserError(
            f'nothing in {where} has the name of a checkpoint of this '
            f'training ({names}); name one by --resume PATH, or choose '
            'another --work-dir to start over'
        )
    if is_main_process():
        print(f'nothing to resume in {where}: training starts from the start')
    return None


def saves_optimizer(config: Config) -> bool:
    """Whether the checkpoints of a training hold its optimizer's state."""
    return bool(_checkpoint_hook(config).get('save_optimizer', True))


def _checkpoint_hook(config: Config) -> dict:
    return (config.get('default_hooks') or {}).get('checkpoint') or {}


def _pointed(work_dir: str) -> Optional[str]:
    path = os.path.join(work_dir, POINTER)
    if not os.path.isfile(path):  # a pipe may never say anything
        return None
    try:
        with open(path, 'rb') as file:
            text = file.read(4096).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not text or '\0' in text:
        return None
    return text if os.path.dirname(text) else os.path.join(work_dir, text)


def _checkpoints(
    folders: List[str], templates: List[str], pointed: Optional[str]
) -> List[str]:
    """Paths of checkpoints, those of the latest step first."""
    patterns = list(dict.fromkeys(map(_pattern, templates)))
    # Path -> which pattern it is of, step, and when it was written.
    found: Dict[str, Tuple[int, int, float]] = {}
    paths = [os.path.join(f, name) for f in folders for name in _names(f)]
    # Its name may be of a template that has been changed since.
    if pointed and os.path.lexists(pointed) and pointed not in paths:
        real = {os.path.realpath(path) for path in paths}
        if os.path.realpath(pointed) not in real:
            paths.append(pointed)
    pointed = pointed and os.path.realpath(pointed)
    for path in paths:
        name = os.path.basename(path)
        matches = [pattern.fullmatch(name) for pattern in patterns]
        kind = next((i for i, m in enumerate(matches) if m), len(patterns))
        if kind == len(patterns) and os.path.realpath(path) != pointed:
            continue
        # Without a step: a fixed name, or one that only the pointer knows.
        step = -1
        if kind < len(patterns) and patterns[kind].groups:
            step = int(matches[kind][1])
        try:
            found[path] = kind, step, os.path.getmtime(path)
        except OSError:  # a link to nowhere
            found[path] = kind, step, 0.0
    if len({kind for kind, _, _ in found.values()}) > 1:
        # Epochs and iterations do not compare: a run that was counted anew.
        return sorted(found, key=lambda p: found[p][:0:-1], reverse=True)
    return sorted(found, key=lambda p: found[p][1:], reverse=True)


def _pattern(template: str) -> re.Pattern:
    """What the names are like that a template gives; its group is the step.

    Args:
        template: As for ``str.format`` with the step, such as
            ``epoch_{:03d}.pth``; without a field it is one name.

    Raises:
        UserError: If it is no template.
    """
    pattern, fields = '', 0
    try:
        parts = list(Formatter().parse(os.path.basename(template)))
    except ValueError as error:
        raise UserError(
            f'filename_tmpl of default_hooks.checkpoint is {template!r}: '
            f'{error}'
        ) from error
    for text, field, _, _ in parts:
        pattern += re.escape(text)
        if field is not None:
            # The same step again; blanks are what a width may fill with.
            pattern += ' *([0-9]{1,18}) *' if not fields else ' *[0-9]+ *'
            fields += 1
    return re.compile(pattern)


def _names(folder: str) -> List[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _others(folders: List[str], start: Optional[str]) -> List[str]:
    """Checkpoints of any name, but the one that a training starts from."""
    start = os.path.realpath(start) if start else None
    paths = [os.path.join(f, name) for f in folders for name in _names(f)]
    return [
        os.path.basename(path)
        for path in paths
        if path.endswith('.pth') and os.path.realpath(path) != start
    ]


def check_resumable(
    content: dict, path: str, needs_optimizer: bool = True
) -> None:
    """Raise unless a training can go on from what a checkpoint holds.

    Args:
        content: What it holds.
        path: The file, for the message.
        needs_optimizer: Whether its optimizer's state must be there.

    Raises:
        UserError: It says what is missing.
    """
    hub, meta = content.get('message_hub'), content.get('meta')
    if hub is None:
        raise UserError(
            f'cannot resume from {path}: it holds weights and no '
            'state of a training'
        )
    # mmengine goes on without, if there is none.
    optimizer = content.get('optimizer', None if needs_optimizer else {})
    strange = [
        name
        for name, fits in (
            ('state_dict', isinstance(content.get('state_dict'), dict)),
            ('meta.epoch', _is_count(meta, 'epoch')),
            ('meta.iter', _is_count(meta, 'iter')),
            ('message_hub', _is_hub(hub)),
            ('optimizer', isinstance(optimizer, dict)),
            (
                'param_schedulers',
                isinstance(content.get('param_schedulers', []), (dict, list)),
            ),
        )
        if not fits
    ]
    if strange:
        raise UserError(
            f'cannot resume from {path}: of another form, or missing, is '
            f'{some(strange, 9)}'
        )


def _is_count(meta: Any, key: str) -> bool:
    value = meta.get(key) if isinstance(meta, dict) else None
    return type(value) is int and value >= 0


def _is_hub(hub: Any) -> bool:
    parts = ('log_scalars', 'runtime_info', 'resumed_keys')
    if not isinstance(hub, dict) or not all(
        isinstance(hub.get(part), dict)
        and all(isinstance(key, str) for key in hub[part])
        for part in parts
    ):
        return False
    ids = hub['runtime_info'].get('keep_ckpt_ids', [])
    return all(
        isinstance(value, HistoryBuffer)
        for value in hub['log_scalars'].values()
    ) and (isinstance(ids, list) and all(type(i) is int for i in ids))
