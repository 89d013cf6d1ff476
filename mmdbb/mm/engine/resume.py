# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Find the checkpoint from which an interrupted training resumes.

mmengine resumes from the checkpoint that the file ``last_checkpoint`` names,
without a check. After a process was killed, that file may be empty, or name a
checkpoint that is truncated. So mmdbb reads the checkpoints themselves, the
newest first, and takes the first one that is whole.
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

#: Limit of the counts of epochs and iterations; no training reaches it.
MOST_STEPS = 10**12
#: Entries of a parameter group that optimizers and schedulers compute with.
NUMBERS = ('lr', 'initial_lr', 'momentum', 'initial_momentum', 'weight_decay')
#: Entries of the state of torch's optimizers that have a parameter's shape.
LIKE_PARAMETERS = frozenset(
    ('momentum_buffer', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'exp_inf')
    + ('square_avg', 'grad_avg', 'acc_delta', 'sum', 'prev', 'ax')
)


def newest_whole_checkpoint(config: Config) -> Optional[str]:
    """Find the newest checkpoint of a work folder that is whole.

    The chosen checkpoint is printed, and for each newer one the reason why it
    was passed over.

    Args:
        config: Config of the training, with ``work_dir``.

    Returns:
        str: Path of the checkpoint; None if the folder has none at all.

    Raises:
        UserError: If the folder has checkpoints, but none of them is whole,
            or none has a name that this training gives to checkpoints.
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
                print(f'{POINTER} names another file, {pointed}')
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
        names = some(others, 9) if others else f'{pointed} is gone'
        raise UserError(
            f'nothing in {where} has the name of a checkpoint of this '
            f'training ({names}); name one by --resume PATH, or choose '
            'another --work-dir to start over'
        )
    if is_main_process():
        print(f'nothing to resume in {where}: training starts anew')
    return None


def saves_optimizer(config: Config) -> bool:
    """Whether the checkpoints of a training hold its optimizer's state.

    Args:
        config: Config of the training.
    """
    return bool(_checkpoint_hook(config).get('save_optimizer', True))


def _checkpoint_hook(config: Config) -> dict:
    return (config.get('default_hooks') or {}).get('checkpoint') or {}


def _pointed(work_dir: str) -> Optional[str]:
    path = os.path.join(work_dir, POINTER)
    if not os.path.isfile(path):  # reading a pipe may never end
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
    """List the checkpoints in some folders, those of the latest step first.

    Args:
        folders: The folders to look in.
        templates: Templates of the checkpoints' names, the config's first.
        pointed: Path that mmengine's pointer names, if any.
    """
    patterns = list(dict.fromkeys(map(_pattern, templates)))
    # Path -> number of the pattern that its name fits, step, time of writing.
    found: Dict[str, Tuple[int, int, float]] = {}
    paths = [os.path.join(f, name) for f in folders for name in _names(f)]
    # The pointer may name a file from before the template was changed.
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
        # Names without a step: a fixed name, or a file that fits no pattern.
        step = -1
        if kind < len(patterns) and patterns[kind].groups:
            step = int(matches[kind][1])
        try:
            found[path] = kind, step, os.path.getmtime(path)
        except OSError:  # a link to nowhere
            found[path] = kind, step, 0.0
    if len({kind for kind, _, _ in found.values()}) > 1:
        # Steps of different patterns (epochs, iterations) do not compare; the
        # time of writing does.
        return sorted(found, key=lambda p: found[p][:0:-1], reverse=True)
    return sorted(found, key=lambda p: found[p][1:], reverse=True)


def _pattern(template: str) -> re.Pattern:
    """Turn a template of names into a pattern, whose group is the step.

    Args:
        template: Format string that ``str.format`` fills with the step, such
            as ``epoch_{:03d}.pth``. One without a field is a fixed name.

    Raises:
        UserError: If it is no valid format string.
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
            # Only the first field is the group; a width may pad with blanks.
            pattern += ' *([0-9]{1,18}) *' if not fields else ' *[0-9]+ *'
            fields += 1
    return re.compile(pattern)


def _names(folder: str) -> List[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _others(folders: List[str], start: Optional[str]) -> List[str]:
    """Names of all ``.pth`` files but the one that the training starts from.

    Args:
        folders: The folders to look in.
        start: The config's ``load_from``, if any.
    """
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
    """Raise unless a training can resume from a checkpoint.

    Args:
        content: Content of the checkpoint.
        path: Path of the checkpoint, for messages.
        needs_optimizer: Whether the checkpoint must hold the state of the
            optimizer.

    Raises:
        UserError: If an entry is missing, of the wrong form or not finite.
            The message names it.
    """
    hub, meta = content.get('message_hub'), content.get('meta')
    if hub is None:
        raise UserError(
            f'cannot resume from {path}: it holds weights and no '
            'state of a training'
        )
    # mmengine would silently resume without the optimizer's state.
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
            f'cannot resume from {path}: missing or of the wrong form: '
            f'{some(strange, 9)}'
        )
    if 'config' in meta:
        # mmengine never writes this entry. But if it is there, mmengine runs
        # it as a config, to learn the number of GPUs.
        raise UserError(
            f'cannot resume from {path}: its meta.config would be run as code'
        )
    infinite = _infinite_in(optimizer)
    if infinite:
        raise UserError(
            f'cannot resume from {path}: not finite numbers: {some(infinite)}'
        )


@contextlib.contextmanager
def explained_resume(path: str) -> Iterator[None]:
    """Within the context, any error becomes one that blames the checkpoint.

    Args:
        path: Path of the checkpoint that is resumed.

    Raises:
        UserError: If there was an error. The message names the file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Optimizers, schedulers and hooks of any kind load their states here,
        # and may raise anything.
        if interruption(error) is not None:
            raise
        raise UserError(
            f'cannot resume from {path}: {type(error).__name__}: {error} '
            '(MMDBB_TRACEBACK=1 shows where)'
        ) from error


def check_resumed(optimizer: Any, path: str) -> None:
    """Raise unless an optimizer's state has the shapes of its parameters.

    torch loads states of any shape, and fails only in the first step.

    Args:
        optimizer: The optimizer, with its loaded state.
        path: Path of the checkpoint, for messages.

    Raises:
        UserError: If a shape differs. The message gives both shapes.
    """
    # Optimizers of other packages may use these names for other shapes.
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
    """Whether these are states of schedulers.

    Args:
        states: A list of states; for several optimizers a dict of lists.
    """
    if isinstance(states, dict):
        return all(
            isinstance(each, list) and _are_schedulers(each)
            for each in states.values()
        )
    return isinstance(states, list) and all(
        isinstance(state, dict)
        and all(isinstance(key, str) for key in state)
        and all(
            # The step is -1 until the scheduler begins.
            type(state.get(key, 0)) is int and -1 <= state.get(key, 0)
            for key in SCHEDULER_COUNTS
        )
        and isinstance(state.get('base_values', []), list)
        and all(map(_is_number, state.get('base_values', [])))
        for state in states
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and _is_finite(value)
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _optimizers(state: dict) -> Dict[str, dict]:
    """Name the state of each optimizer.

    Args:
        state: The state of one optimizer, or mmengine's dict of the states of
            several.
    """
    if 'param_groups' in state or 'state' in state:
        return {'optimizer': state}
    return {
        f'optimizer.{name}': value
        for name, value in state.items()
        if isinstance(value, dict)
        and ('param_groups' in value or 'state' in value)
    }


def _strange_in_optimizers(states: dict) -> List[str]:
    """Names of the entries that no optimizer of torch can load.

    Args:
        states: The state of one optimizer, or of several in a dict.
    """
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
        # Under an integer key torch keeps the state of one parameter.
        strange += [
            f'{name}.state.{key}'
            for key, value in state.items()
            if isinstance(key, int) and not isinstance(value, dict)
        ]
    return strange


def _infinite_in(states: dict) -> List[str]:
    """Names of the values in optimizers' states that are not finite numbers.

    Args:
        states: The state of one optimizer, or of several in a dict.
    """
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
    # With strides of zero, a few bytes can claim to be terabytes of numbers,
    # which isfinite() would allocate.
    size = value.numel() * value.element_size()
    if size > value.untyped_storage().nbytes():
        return False
    return value.dtype not in DTYPES or bool(value.isfinite().all())
