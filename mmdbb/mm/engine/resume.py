# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which checkpoint an interrupted training goes on from.

mmengine follows the file ``last_checkpoint``, whatever it says. A process
that is killed can leave it empty, or before what it names is whole. So here
the checkpoints themselves are asked, the newest first.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from numbers import Real
from string import Formatter
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.dist import is_main_process
from torch import Tensor, strided

from mmdbb.errors import UserError, interruption
from mmdbb.files.sources import DTYPES, some
from mmdbb.files.values import Unread
from mmdbb.mm.host_internals import (
    POINTER,
    SCHEDULER_COUNTS,
    TEMPLATES,
    checkpoint_folder,
    is_hub_state,
)
from mmdbb.mm.host_loading import load_from_local

#: A checkpoint that counts more was not written by a training.
MOST_STEPS = 10**12
#: Of a group of parameters: what an optimizer and its schedulers compute with.
NUMBERS = ('lr', 'initial_lr', 'momentum', 'initial_momentum', 'weight_decay')
#: What torch's optimizers keep in the shape of a parameter.
LIKE_PARAMETERS = frozenset(
    ('momentum_buffer', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'exp_inf')
    + ('square_avg', 'grad_avg', 'acc_delta', 'sum', 'prev', 'ax')
)


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
            ('meta.seed', _is_seed(meta)),
            ('meta.cfg', _is_text(meta, 'cfg')),
            ('message_hub', is_hub_state(hub)),
            ('optimizer', isinstance(optimizer, dict)),
            (
                'param_schedulers',
                _are_schedulers(content.get('param_schedulers', [])),
            ),
        )
        if not fits
    ]
    if not strange:
        strange = _strange_in_optimizers(optimizer)
    if strange:
        raise UserError(
            f'cannot resume from {path}: of another form, or missing, is '
            f'{some(strange, 9)}'
        )
    if 'config' in meta:
        # mmengine never writes it, but runs it to count the GPUs it names.
        raise UserError(
            f'cannot resume from {path}: its meta.config would be run as code'
        )
    infinite = _infinite_in(optimizer)
    if infinite:
        raise UserError(
            f'cannot resume from {path}: not finite, or no plain numbers, is '
            f'{some(infinite)}'
        )


@contextlib.contextmanager
def explained_resume(path: str) -> Iterator[None]:
    """Within the context, what cannot be resumed is a mistake of the file.

    Args:
        path: The file.

    Raises:
        UserError: It names the file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Optimizers, schedulers and hooks of any kind take their states.
        if interruption(error) is not None:
            raise
        raise UserError(
            f'cannot resume from {path}: {type(error).__name__}: {error} '
            '(MMDBB_TRACEBACK=1 shows where)'
        ) from error


def check_resumed(optimizer: Any, path: str) -> None:
    """Raise unless an optimizer's state is of the shapes of its parameters.

    torch takes any, and fails in the first step.

    Args:
        optimizer: With a state that was loaded.
        path: The file, for the message.

    Raises:
        UserError: It says of which shapes it is.
    """
    # Other packages' keep states of their own shapes under the same names.
    if not type(optimizer).__module__.startswith('torch.optim'):
        return
    for parameter, values in optimizer.state.items():
        for name in LIKE_PARAMETERS.intersection(values):
            value = values[name]
            if value is None:
                continue
            found = getattr(value, 'shape', None)
            if found != parameter.shape:
                what = type(value).__name__ if found is None else tuple(found)
                raise UserError(
                    f'cannot resume from {path}: {name} of the optimizer is '
                    f'{what} for a parameter of {tuple(parameter.shape)}'
                )


def _is_count(meta: Any, key: str) -> bool:
    value = meta.get(key) if isinstance(meta, dict) else None
    return type(value) is int and 0 <= value < MOST_STEPS


def _is_seed(meta: Any) -> bool:
    value = meta.get('seed') if isinstance(meta, dict) else None
    return value is None or (
        isinstance(value, (int, np.integer)) and 0 <= value < 1 << 32
    )


def _is_text(meta: Any, key: str) -> bool:
    value = meta.get(key) if isinstance(meta, dict) else None
    return value is None or isinstance(value, str)


def _are_schedulers(states: Any) -> bool:
    """Whether these are states of schedulers, in a dict if of several."""
    if isinstance(states, dict):
        return all(
            isinstance(each, list) and _are_schedulers(each)
            for each in states.values()
        )
    return isinstance(states, list) and all(
        isinstance(state, dict)
        and all(isinstance(key, str) for key in state)
        and all(
            type(state.get(key, 0)) is int and 0 <= state.get(key, 0)
            for key in SCHEDULER_COUNTS
        )
        and isinstance(state.get('base_values', []), list)
        and all(map(_is_number, state.get('base_values', [])))
        for state in states
    )


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, as such or as a tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and _is_finite(value)
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer that is no float
        return False


def _optimizers(state: dict) -> Dict[str, dict]:
    """The states by name: mmengine keeps those of several in a dict."""
    if 'param_groups' in state or 'state' in state:
        return {'optimizer': state}
    return {
        f'optimizer.{name}': value
        for name, value in state.items()
        if isinstance(value, dict)
        and ('param_groups' in value or 'state' in value)
    }


def _strange_in_optimizers(states: dict) -> List[str]:
    """What no optimizer of torch takes, by name."""
    if not isinstance(states, dict):
        return ['optimizer']
    strange = []
    for name, optimizer in _optimizers(states).items():
        groups = optimizer.get('param_groups')
        if not isinstance(groups, list) or not groups:
            strange.append(f'{name}.param_groups')
            groups = []
        for i, group in enumerate(groups):
            if not isinstance(group, dict) or not isinstance(
                group.get('params'), list
            ):
                strange.append(f'{name}.param_groups.{i}')
                continue
            strange += [
                f'{name}.param_groups.{i}.{key}'
                for key in NUMBERS
                if group.get(key) is not None and not _is_number(group[key])
            ]
        state = optimizer.get('state')
        if not isinstance(state, dict):
            strange.append(f'{name}.state')
            continue
        # By number, torch keeps what belongs to a parameter.
        strange += [
            f'{name}.state.{key}'
            for key, value in state.items()
            if isinstance(key, int) and not isinstance(value, dict)
        ]
    return strange


def _infinite_in(states: dict) -> List[str]:
    """Which values of optimizers' states are no finite numbers."""
    return [
        f'{name}.state.{key}.{entry}'
        for name, optimizer in _optimizers(states).items()
        for key, values in optimizer['state'].items()
        if isinstance(values, dict)
        for entry, value in values.items()
        if isinstance(value, Unread)
        or (isinstance(value, Tensor) and not _is_finite(value))
        or (isinstance(value, float) and not math.isfinite(value))
    ]


def _is_finite(value: Tensor) -> bool:
    if value.is_nested or value.layout != strided or value.is_meta:
        return False
    # A few bytes can claim to be many numbers, by strides of zero.
    size = value.numel() * value.element_size()
    if size > value.untyped_storage().nbytes():
        return False
    return value.dtype not in DTYPES or bool(value.isfinite().all())
