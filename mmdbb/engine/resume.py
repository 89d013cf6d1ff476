# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which checkpoint an interrupted training goes on from.

mmengine follows the file ``last_checkpoint``, whatever it says. A process
that is killed can leave it empty, or before what it names is whole. So here
the checkpoints themselves are asked, the newest first.
"""

from __future__ import annotations

import os
import re
from typing import Any, Dict, Iterator, List, Optional, Tuple

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
        UserError: If there are some, but none is whole.
    """
    hook = (config.get('default_hooks') or {}).get('checkpoint') or {}
    folder = checkpoint_folder(config.work_dir, hook.get('out_dir'))
    folders = [folder]
    pointed = _pointed(config.work_dir)
    if pointed and os.path.dirname(pointed):
        folders.append(os.path.dirname(pointed))
    template = hook.get('filename_tmpl')
    found = _checkpoints(folders, [template] if template else TEMPLATES)
    reasons = []
    for path in found:
        try:
            check_resumable(load_from_local(path), path)
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
    if found:
        raise UserError(
            f'none of the checkpoints in {" and ".join(folders)} is whole: '
            f'{"; ".join(reasons)}; to start over, choose another --work-dir'
        )
    return None


def _pointed(work_dir: str) -> Optional[str]:
    try:
        with open(os.path.join(work_dir, POINTER), 'rb') as file:
            return file.read(4096).decode().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _checkpoints(folders: List[str], templates: Any) -> List[str]:
    """Paths of checkpoints, those of the latest step first."""
    found: Dict[str, Tuple[int, float]] = {}
    for folder in folders:
        for name, step in _named(folder, templates):
            path = os.path.join(folder, name)
            try:
                found.setdefault(path, (step, os.path.getmtime(path)))
            except OSError:  # a link to nowhere
                found.setdefault(path, (step, 0.0))
    if len({os.path.basename(p).split('_')[0] for p in found}) > 1:
        # Epochs and iterations do not compare: a run that was counted anew.
        return sorted(found, key=lambda p: found[p][1], reverse=True)
    return sorted(found, key=found.get, reverse=True)


def _named(folder: str, templates: Any) -> Iterator[Tuple[str, int]]:
    patterns = [
        re.compile(re.escape(t).replace(r'\{\}', '([0-9]{1,18})'))
        for t in templates
    ]
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for name in names:
        for pattern in patterns:
            match = pattern.fullmatch(name)
            if match:
                yield name, int(match[1])


def check_resumable(content: dict, path: str) -> None:
    """Raise unless a training can go on from what a checkpoint holds.

    Args:
        content: What it holds.
        path: The file, for the message.

    Raises:
        UserError: It says what is missing.
    """
    hub, meta = content.get('message_hub'), content.get('meta')
    if hub is None:
        raise UserError(
            f'cannot resume from {path}: it holds weights and no '
            'state of a training'
        )
    strange = [
        name
        for name, fits in (
            ('state_dict', isinstance(content.get('state_dict'), dict)),
            ('meta.epoch', _is_count(meta, 'epoch')),
            ('meta.iter', _is_count(meta, 'iter')),
            ('message_hub', _is_hub(hub)),
            ('optimizer', isinstance(content.get('optimizer'), dict)),
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
