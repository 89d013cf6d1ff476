# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The private parts of OpenMMLab's packages that mmdbb relies on.

A host may change them in any version. Each has a name here, the versions in
which it was seen, and a test in ``tests/test_mm/test_host_internals.py`` that
fails where a host no longer has it. No other file touches a private
attribute of a host's, or puts a function of mmdbb's in the place of one.

Seen means: mmengine 0.10.7, mmcv 2.1.0, mmpretrain 1.2.0, mmdet 3.3.0 and
mmsegmentation 1.2.2, unless a function names another version.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import traceback
from types import FrameType
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    Optional,
    Set,
    Tuple,
)

import numpy as np
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import initialize
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner import checkpoint as host_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from mmdbb.mm.hosts import is_installed
from mmdbb.ports import Ports

#: Launcher -> the variable by which mmengine knows that it started a process.
LAUNCHED = {
    'pytorch': 'RANK',
    'slurm': 'SLURM_PROCID',
    'mpi': 'OMPI_COMM_WORLD_LOCAL_RANK',
}
#: mmdet's model of test-time augmentation, which it registers in the root.
DET_TTA_MODEL = 'DetTTAModel'
#: The file that says which checkpoint was written last.
POINTER = 'last_checkpoint'
#: What checkpoints are called by default, of epochs and of iterations.
TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth')
#: What counts steps in the state of a scheduler.
SCHEDULER_COUNTS = ('last_step', '_global_step')


# What the lower storey asks of mmengine and mmcv


def plug_in(ports: Ports) -> None:
    """Give the lower storey what it asks of mmengine and mmcv."""
    ports.initialize = initialize
    ports.is_host_rule = is_init_rule
    ports.refuse_fusion = refuse_wrong_fusion
    ports.log = log
    ports.history = history
    ports.classes = {
        'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
        'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler': (
            OneCycleParamScheduler
        ),
    }


def cure_config_bases() -> None:
    """Let ``_base_ = 'mmseg::...'`` find the onedl fork's configs.

    mmengine (0.10.7, onedl 0.10.12) looks for a distribution that a table
    names, ``mmsegmentation``, which the fork is not. Where there is none, the
    module's own name serves: mmengine then finds the package by importing it.
    Takes effect on configs that are read afterwards.
    """
    if not is_installed('mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def log(message: str, level: int = logging.INFO) -> None:
    """Write to the log of the run, if there is one."""
    print_log(message, logger='current', level=level)


def is_init_rule(rule: Callable) -> bool:
    """Whether a function is what mmengine applies of ``init_cfg``.

    Its rules are local functions of this module (mmengine 0.10.7).
    """
    return getattr(rule, '__module__', None) == 'mmengine.model.weight_init'


def history(
    max_length: int, values: np.ndarray, counts: np.ndarray
) -> HistoryBuffer:
    """A ``HistoryBuffer`` of given content (mmengine 0.10.7).

    Its constructor would copy the arrays into lists and back.
    """
    made = HistoryBuffer(max_length=max_length)
    made._log_history, made._count_history = values, counts
    return made


def refuse_wrong_fusion(block: nn.Module, caller: FrameType) -> None:
    """Raise if the walk that came to a block goes on to a wrong fusion.

    mmcv's ``fuse_conv_bn`` (2.1.0) walks through the children of each module
    in their order, and fuses a norm into the convolution that it saw last. A
    block that is not merged is no ``nn.Conv2d``, so it is not seen: the norm
    behind a block would be fused into a plain convolution before it. The
    hosts call that function when they load a network, and nothing tells a
    child of it but the walk through the child's own children; so there, and
    only if that function walks, its frames are read.

    Args:
        block: The block whose children are asked for.
        caller: The frame of whoever asks.

    Raises:
        ValueError: If it is ``fuse_conv_bn``, and of a module around the
            block it would fuse a norm that follows the block, or what holds
            the block, into a convolution that precedes it.
    """
    child, outer = block, caller.f_back
    while _is_fusing(caller) and _is_fusing(outer):
        parent, seen = outer.f_locals['module'], outer.f_locals['last_conv']
        norm = _next_norm(parent, child)
        if seen is not None and norm is not None:
            raise ValueError(
                f'fuse_conv_bn would fuse {norm!r} of a '
                f'{type(parent).__name__} into '
                f'{outer.f_locals["last_conv_name"]!r}, although a '
                f'{type(block).__name__} stands between them; merge first: '
                'fuse_conv_bn(mmdbb.reparameterize(model))'
            )
        child, outer = parent, outer.f_back


def _is_fusing(frame: Optional[FrameType]) -> bool:
    return (
        frame is not None
        and frame.f_code.co_name == 'fuse_conv_bn'
        and {'module', 'last_conv', 'last_conv_name'} <= set(frame.f_locals)
    )


def _next_norm(parent: nn.Module, child: nn.Module) -> Optional[str]:
    """Name of the norm after a child, if no convolution comes before it."""
    children = iter(parent._modules.items())
    for _, module in children:
        if module is child:
            break
    for name, module in children:
        if isinstance(module, _BatchNorm):
            return name
        if isinstance(module, nn.Conv2d):
            return None
    return None


# Methods of single objects


@contextlib.contextmanager
def replaced(owner: object, name: str, function: Callable) -> Iterator[None]:
    """Within the context one object has another method.

    Args:
        owner: The object, whose class has a method of that name.
        name: Name of the method.
        function: What is called instead, without the object.
    """
    replace(owner, name, function)
    try:
        yield
    finally:
        take_back(owner, name)


def replace(owner: object, name: str, function: Callable) -> None:
    """Give one object another method, until :func:`take_back`.

    Args:
        owner: The object, whose class has a method of that name.
        name: Name of the method.
        function: What is called instead, without the object.

    Raises:
        AttributeError: If there is no such method.
    """
    if not callable(getattr(owner, name)):
        raise AttributeError(f'{name} of {type(owner).__name__} is no method')
    setattr(owner, name, function)


def take_back(owner: object, name: str) -> None:
    """Let an object have its class's method again; it may have it already."""
    vars(owner).pop(name, None)


# Reading checkpoints


def replace_readers(load_file: Callable, load_url: Callable) -> None:
    """Let mmengine read all checkpoints by functions of mmdbb.

    Local files are read by what is registered for no scheme. For ``http``,
    ``https``, ``torchvision``, ``open-mmlab`` and ``mmcls`` mmengine calls
    the function ``load_url`` of its module.

    Args:
        load_file: Takes a path and a device.
        load_url: Takes what torch's function of the name takes.
    """
    CheckpointLoader.register_scheme('', load_file, force=True)
    if not callable(host_checkpoint.load_url):
        raise AttributeError('mmengine.runner.checkpoint has no load_url')
    host_checkpoint.load_url = load_url


def loaded_state(checkpoint: dict) -> dict:
    """The weights of a checkpoint under the names that mmengine loads.

    ``Runner.load_checkpoint`` takes away the name of a wrapper.

    Args:
        checkpoint: What a file holds.
    """
    state = checkpoint.get('state_dict', checkpoint)
    return {re.sub('^module[.]', '', name): v for name, v in state.items()}


# Writing checkpoints


class RemovingLast(CheckpointHook):
    """A ``CheckpointHook`` that removes old files after it has written.

    mmengine removes them first, by ``self.file_backend``, in the two methods
    that are overridden here.

    Args:
        arguments: As of ``CheckpointHook``.
    """

    def _save_checkpoint_with_step(self, *args: Any, **kwargs: Any) -> None:
        with self._removing_last():
            super()._save_checkpoint_with_step(*args, **kwargs)

    def _save_best_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._removing_last():
            super()._save_best_checkpoint(*args, **kwargs)

    @contextlib.contextmanager
    def _removing_last(self) -> Iterator[None]:
        backend = self.file_backend
        if isinstance(backend, _Later):  # saving the best saves the last too
            yield
            return
        self.file_backend = _Later(backend)
        try:
            yield
            removals = self.file_backend.removals
        finally:
            self.file_backend = backend
        kept = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}
        kept.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        for remove, path in removals:
            if path not in kept:  # written again under its name
                remove(path)


class _Later:
    """A file backend that removes nothing yet."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        #: What to remove, and the method that does.
        self.removals: List[Tuple[Any, str]] = []

    def remove(self, path: str) -> None:
        self.removals.append((self.backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.removals.append((self.backend.rmtree, path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


def checkpoint_folder(work_dir: str, out_dir: Any = None) -> str:
    """The folder that ``CheckpointHook`` writes to.

    Args:
        work_dir: Of the run.
        out_dir: Of the hook.
    """
    if out_dir is None or str(out_dir) == work_dir:
        return work_dir
    return os.path.join(out_dir, os.path.basename(work_dir.rstrip(os.sep)))


def best_checkpoints(runner: Runner) -> Dict[str, Tuple[str, object]]:
    """The best checkpoints that a run has so far, by metric.

    ``CheckpointHook`` notes them as ``best_ckpt`` and ``best_score``, followed
    by ``_METRIC`` where there are several.

    Returns:
        dict: Metric (empty if there is only one) -> path and score.
    """
    infos = runner.message_hub.runtime_info
    return {
        name[len('best_ckpt') :]: (
            str(path),
            infos.get(name.replace('ckpt', 'score', 1)),
        )
        for name, path in infos.items()
        if name.startswith('best_ckpt') and path
    }


def forget_best(runner: Runner, metric: str) -> None:
    """Let a run know of no best checkpoint.

    Args:
        runner: Of the run.
        metric: As of :func:`best_checkpoints`.
    """
    runner.message_hub.runtime_info[f'best_ckpt{metric}'] = None


def is_hub_state(state: Any) -> bool:
    """Whether a message hub can take over a state from a checkpoint."""
    parts = ('log_scalars', 'runtime_info', 'resumed_keys')
    if not isinstance(state, dict) or not all(
        isinstance(state.get(part), dict)
        and all(isinstance(key, str) for key in state[part])
        for part in parts
    ):
        return False
    ids = state['runtime_info'].get('keep_ckpt_ids', [])
    return all(
        isinstance(value, HistoryBuffer)
        for value in state['log_scalars'].values()
    ) and (isinstance(ids, list) and all(type(i) is int for i in ids))


# Runners


def drop_hooks(runner: Runner) -> None:
    """Let a runner's loops run without logging, drawing and saving.

    ``Runner.hooks`` is the list itself.
    """
    runner.hooks.clear()


def name_run(cfg: Config, name: str) -> None:
    """Give the run of a config a name, and a visualizer of its own.

    mmengine keeps visualizers by name, with the folder they began with.

    Args:
        cfg: Changed in place.
        name: That no other run has.
    """
    cfg.experiment_name = name
    cfg.visualizer = dict(type='Visualizer', name=name, vis_backends=[])


def resume_within(
    runner: Runner, context: Callable[[str], ContextManager]
) -> None:
    """Let a runner resume within a context: ``Runner.train`` calls it itself.

    Args:
        runner: Changed in place.
        context: From the checkpoint's path to a context.
    """
    resume = runner.resume

    @functools.wraps(resume)
    def resumed(path: str, *args: object, **kwargs: object) -> None:
        with context(path):
            resume(path, *args, **kwargs)

    replace(runner, 'resume', resumed)


def give_dataset(loader: DataLoader, dataset: Dataset) -> None:
    """Give a runner's dataloader another data set.

    torch (2.12) refuses it once a loader is built; its workers must not have
    started.

    Args:
        loader: Changed in place.
        dataset: As long as the one before.
    """
    object.__setattr__(loader, 'dataset', dataset)


def is_building(error: BaseException) -> bool:
    """Whether an error was raised while a runner built a part of its config.

    ``Runner`` does so in its methods ``build_*``.
    """
    return any(
        frame.f_globals.get('__name__') == 'mmengine.runner.runner'
        and frame.f_code.co_name.startswith('build_')
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


# Configs


def note_of(cfg: Config, name: str, default: Any = None) -> Any:
    """What :func:`make_note` noted in a config."""
    return vars(cfg).get(name, default)


def make_note(cfg: Config, name: str, value: Any) -> None:
    """Note something in a config that is none of its fields.

    ``Config.__setattr__`` makes a field of whatever it gets. Copies keep the
    note.

    Args:
        cfg: Changed in place.
        name: Starts with an underscore.
        value: Anything.
    """
    object.__setattr__(cfg, name, value)


def forget_filename(cfg: Config) -> None:
    """Let a config not know its file: its dump gets the name of its time."""
    object.__setattr__(cfg, '_filename', None)


def files_in_text(cfg: Config) -> Set[str]:
    """The files that the text of a config names: itself and its bases.

    mmengine puts each file's path before its text.
    """
    return {
        line
        for line in (cfg.text or '').splitlines()
        if os.path.isabs(line) and os.path.isfile(line)
    }


# Starts


def is_initializing(module: nn.Module) -> bool:
    """Whether ``init_weights`` of a module, or of one around it, runs."""
    return hasattr(module, '_params_init_info')


def shared_notes(module: nn.Module) -> dict:
    """A dict that all modules share of which ``init_weights`` runs.

    mmengine keeps in it, by parameter, who initialised what. Outside of that
    it is an empty one.
    """
    return getattr(module, '_params_init_info', {})


def initialize_children(module: nn.Module) -> None:
    """Do now what mmengine does after a rule of a module: its children's."""
    for child in module.children():
        if hasattr(child, 'init_weights') and not getattr(
            child, 'is_init', False
        ):
            child.init_weights()
            child.is_init = True


def say_pretrained(module: nn.Module, checkpoint: str) -> None:
    """Tell a module that its weights are loaded.

    The hosts' last steps, such as ``zero_init_residual``, ask for an
    ``init_cfg`` of type ``Pretrained``.

    Args:
        module: Changed in place.
        checkpoint: Where the weights come from.
    """
    module.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)


# Images


def channel_order(preprocessor: Any) -> Optional[str]:
    """In which order a data preprocessor gives channels to the network.

    Images are read as BGR. mmpretrain's preprocessors have ``to_rgb``; those
    of mmdet and mmseg ``channel_conversion``, which mmengine keeps as
    ``_channel_conversion``.

    Args:
        preprocessor: Of a model; None for none.

    Returns:
        str: ``'RGB'`` or ``'BGR'``; None if unknown.
    """
    for name in ('to_rgb', 'channel_conversion', '_channel_conversion'):
        if hasattr(preprocessor, name):
            return 'RGB' if getattr(preprocessor, name) else 'BGR'
    return None
