# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The private parts of OpenMMLab's packages that mmdbb relies on.

These packages, the hosts, may change them in any version. A function or class
here stands for each such part, and a test in
``tests/test_mm/test_host_internals.py`` fails if a host no longer has it. No
other file uses a host's private attributes, or replaces a host's functions.

All were checked in mmengine 0.10.7, mmcv 2.1.0, mmpretrain 1.2.0, mmdet 3.3.0
and mmsegmentation 1.2.2, unless a function names another version.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import re
import sys
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
    Sequence,
    Set,
    Tuple,
)

import numpy as np
from mmcv.cnn import build_conv_layer, build_upsample_layer
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dataset import BaseDataset
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
from mmdbb.ports import Ports, ReplacedLayer

#: Launcher -> the environment variable that it sets in each process, by which
#: mmengine knows the launcher.
LAUNCHED = {
    'pytorch': 'RANK',
    'slurm': 'SLURM_PROCID',
    'mpi': 'OMPI_COMM_WORLD_LOCAL_RANK',
}
#: mmdet's model for test-time augmentation. mmdet registers it in mmengine's
#: root registry, not in its own.
DET_TTA_MODEL = 'DetTTAModel'
#: mmcv's type of the transposed convolutions that ``build_upsample_layer``
#: makes.
UPSAMPLE_TYPE = 'deconv'
#: Name of the file that holds the path of the checkpoint written last.
POINTER = 'last_checkpoint'
#: Default names of checkpoints of epochs and of iterations.
TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth')
#: Entries of a scheduler's state that count steps.
SCHEDULER_COUNTS = ('last_step', '_global_step')


# Functions of mmengine and mmcv for the part of mmdbb that needs torch only


def plug_in(ports: Ports) -> None:
    """Connect the part of mmdbb that needs torch only to mmengine and mmcv.

    Args:
        ports: The functions to set; changed in place.
    """
    ports.initialize = initialize
    ports.is_host_rule = is_init_rule
    ports.refuse_fusion = refuse_wrong_fusion
    ports.class_of_layer = class_of_layer
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

    mmengine (0.10.7, onedl 0.10.12) translates ``mmseg`` by a table into the
    distribution ``mmsegmentation``, but the fork's distribution has another
    name. If ``mmsegmentation`` is not installed, this puts the module's own
    name into the table, and mmengine finds the package by importing it. Only
    configs that are read afterwards benefit.
    """
    if not is_installed('mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def log(message: str, level: int = logging.INFO) -> None:
    """Write to the log of the current run, if there is one.

    Args:
        message: The message.
        level: Level of the standard library's logging.
    """
    print_log(message, logger='current', level=level)


def is_init_rule(rule: Callable) -> bool:
    """Whether a function is a rule of ``init_cfg`` that mmengine applies.

    Those are local functions of ``mmengine.model.weight_init`` (mmengine
    0.10.7).

    Args:
        rule: A function that ``Module.apply`` was called with.
    """
    return getattr(rule, '__module__', None) == 'mmengine.model.weight_init'


def history(
    max_length: int, values: np.ndarray, counts: np.ndarray
) -> HistoryBuffer:
    """Make a ``HistoryBuffer`` of given content (mmengine 0.10.7).

    The arrays are set directly, because its constructor would copy them into
    lists and back.

    Args:
        max_length: Largest number of values that the buffer keeps.
        values: The logged values.
        counts: How many samples each value stands for.
    """
    made = HistoryBuffer(max_length=max_length)
    made._log_history, made._count_history = values, counts
    return made


def refuse_wrong_fusion(block: nn.Module, caller: FrameType) -> None:
    """Raise if mmcv's ``fuse_conv_bn`` would fuse the norm after a block.

    ``fuse_conv_bn`` (mmcv 2.1.0) walks through the children of each module in
    their order, and fuses a norm into the convolution that it saw last. It
    does not see a block that is not merged, because that is no ``nn.Conv2d``,
    so it would fuse the norm after the block into a plain convolution before
    the block. The hosts call it when they load a network. A block notices
    only that someone asks for its children, so it calls this function then.
    Only if ``fuse_conv_bn`` asked are the local variables of its calls read.

    Args:
        block: The block whose children are asked for.
        caller: The frame of the function that asks.

    Raises:
        ValueError: If that function is ``fuse_conv_bn``, and in a module
            around the block it would fuse a norm after the block (or after a
            module that contains the block) into a convolution before it.
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


def class_of_layer(layer: nn.Module) -> type:
    """The class of a layer, but torch's for mmcv's wrapper of a layer.

    The types ``Conv``, ``Conv3d`` and ``deconv`` name subclasses of torch's
    layers, in ``mmcv.cnn.bricks.wrappers`` (mmcv 2.1.0). They compute the
    same; for a torch before 1.5 they gave an empty output for no images.

    Args:
        layer: The layer.
    """
    is_wrapper = type(layer).__module__ == 'mmcv.cnn.bricks.wrappers'
    return type(layer).__mro__[1 if is_wrapper else 0]


def builds_conv_layer(caller: FrameType) -> bool:
    """Whether a frame is of a function of mmcv's that builds layers.

    ``build_conv_layer`` and ``build_upsample_layer`` (mmcv 2.1.0) call a class
    that is the ``type`` of a layer's config directly.

    Args:
        caller: The frame.
    """
    builders = build_conv_layer.__code__, build_upsample_layer.__code__
    return caller.f_code in builders


def _builds_upsample_layer() -> bool:
    """Whether ``build_upsample_layer`` asked for the layer being built."""
    frame = sys._getframe(1)
    while frame.f_globals.get('__name__', '').startswith('mmdbb.'):
        frame = frame.f_back
    return frame.f_code is build_upsample_layer.__code__


def replaced_layer(is_block: Callable[[dict], bool]) -> ReplacedLayer:
    """The layer that the config of a block replaces in a host's network.

    ``conv_cfg`` replaces a class's default, and nothing tells the block. But
    while the network is being built, the constructor that got this
    ``conv_cfg`` is running, so its frame holds it.

    Args:
        is_block: Whether a layer's config names the block.
    """
    if _builds_upsample_layer():
        return ReplacedLayer('build_upsample_layer', UPSAMPLE_TYPE)
    found, spectral, frame = None, False, sys._getframe(1)
    while frame is not None and found is None:
        if frame.f_code.co_name == '__init__':
            values = frame.f_locals
            owner, layer = type(values.get('self')), values.get('conv_cfg')
            if isinstance(layer, dict) and is_block(layer):
                found = default_conv_type(owner)
                spectral = spectral or values.get('with_spectral_norm') is True
                if spectral and found is None:
                    found = 'Conv2d'
        frame = frame.f_back
    if found is None:
        return ReplacedLayer()
    return ReplacedLayer(owner.__name__, found, spectral)


def default_conv_type(owner: type) -> Optional[str]:
    """The type of the convolutions that a class of a host has by default.

    Args:
        owner: The class.

    Returns:
        str: The type in the default of its argument ``conv_cfg``; None if
        the default is None, or there is no such argument.
    """
    for cls in owner.__mro__:
        init = vars(cls).get('__init__')
        if not inspect.isfunction(init):
            continue
        argument = inspect.signature(init).parameters.get('conv_cfg')
        if argument is not None:
            default = argument.default
            kind = default.get('type') if isinstance(default, dict) else None
            return getattr(kind, '__name__', kind)
    return None


def _is_fusing(frame: Optional[FrameType]) -> bool:
    return (
        frame is not None
        and frame.f_code.co_name == 'fuse_conv_bn'
        and {'module', 'last_conv', 'last_conv_name'} <= set(frame.f_locals)
    )


def _next_norm(parent: nn.Module, child: nn.Module) -> Optional[str]:
    """Name of the first norm after a child; None if a convolution is first."""
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
    """Replace a method of one object within the context.

    Args:
        owner: The object, whose class has a method of that name.
        name: Name of the method.
        function: The function to call instead. It does not get the object.
    """
    replace(owner, name, function)
    try:
        yield
    finally:
        take_back(owner, name)


def replace(owner: object, name: str, function: Callable) -> None:
    """Replace a method of one object, until :func:`take_back`.

    Args:
        owner: The object, whose class has a method of that name.
        name: Name of the method.
        function: The function to call instead. It does not get the object.

    Raises:
        AttributeError: If there is no such method.
    """
    if not callable(getattr(owner, name)):
        raise AttributeError(f'{name} of {type(owner).__name__} is no method')
    setattr(owner, name, function)


def take_back(owner: object, name: str) -> None:
    """Undo :func:`replace`; nothing happens if nothing was replaced.

    Args:
        owner: The object.
        name: Name of the method.
    """
    vars(owner).pop(name, None)


# Reading checkpoints


def replace_readers(load_file: Callable, load_url: Callable) -> None:
    """Make mmengine read all checkpoints by functions of mmdbb.

    mmengine reads local files with the loader registered for the empty
    scheme. For ``http``, ``https``, ``torchvision``, ``open-mmlab`` and
    ``mmcls`` it calls ``load_url`` of ``mmengine.runner.checkpoint``.

    Args:
        load_file: Reads a local file; takes its path and a device.
        load_url: Downloads and reads a file; takes the arguments of
            ``torch.hub.load_state_dict_from_url``.
    """
    CheckpointLoader.register_scheme('', load_file, force=True)
    if not callable(host_checkpoint.load_url):
        raise AttributeError('mmengine.runner.checkpoint has no load_url')
    host_checkpoint.load_url = load_url


def loaded_state(checkpoint: dict) -> dict:
    """The weights of a checkpoint under the names that mmengine loads.

    Like ``Runner.load_checkpoint``, this removes ``module.`` from the start
    of names, which wrappers for distributed training add.

    Args:
        checkpoint: Content of the file.
    """
    state = checkpoint.get('state_dict', checkpoint)
    return {re.sub('^module[.]', '', name): v for name, v in state.items()}


# Writing checkpoints


class RemovingLast(CheckpointHook):
    """A ``CheckpointHook`` that removes old files after it has written.

    mmengine's hook removes them first, so a crash while it writes could leave
    no checkpoint. It removes them by ``self.file_backend`` in the two methods
    that are overridden here. The arguments are ``CheckpointHook``'s own.
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
        if isinstance(backend, _Later):  # the outer method removes them
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
    """A file backend that notes what to remove instead of removing it."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        #: The method to remove a path with, and the path, for each.
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
        work_dir: The run's ``work_dir``.
        out_dir: The hook's ``out_dir``; None if it has none.
    """
    if out_dir is None or str(out_dir) == work_dir:
        return work_dir
    return os.path.join(out_dir, os.path.basename(work_dir.rstrip(os.sep)))


def best_checkpoints(runner: Runner) -> Dict[str, Tuple[str, object]]:
    """The best checkpoints that a run has so far, by metric.

    ``CheckpointHook`` notes them in the message hub as ``best_ckpt`` and
    ``best_score``, followed by ``_METRIC`` if there are several metrics.

    Args:
        runner: The run's runner.

    Returns:
        dict: That suffix (empty for a single metric) -> path and score.
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
    """Make a run forget its best checkpoint of a metric.

    Args:
        runner: The run's runner.
        metric: A key of :func:`best_checkpoints`.
    """
    runner.message_hub.runtime_info[f'best_ckpt{metric}'] = None


def is_hub_state(state: Any) -> bool:
    """Whether a message hub can load a state.

    Args:
        state: The hub's state in a checkpoint, of any type.
    """
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
    """Remove a runner's hooks, so it does not log, draw or save.

    Clearing ``Runner.hooks`` is enough, as it returns the runner's own list.

    Args:
        runner: Changed in place.
    """
    runner.hooks.clear()


def name_run(cfg: Config, name: str) -> None:
    """Give the run of a config a name, and a visualizer of its own.

    mmengine keeps visualizers by name, so a second run under the same name
    would write into the first one's folder.

    Args:
        cfg: The config; changed in place.
        name: A name that no other run of this process has.
    """
    cfg.experiment_name = name
    cfg.visualizer = dict(type='Visualizer', name=name, vis_backends=[])


def resume_within(
    runner: Runner, context: Callable[[str], ContextManager]
) -> None:
    """Make a runner resume within a context.

    The method is replaced because ``Runner.train`` calls ``resume`` itself.

    Args:
        runner: The runner; changed in place.
        context: Takes the checkpoint's path, returns the context.
    """
    resume = runner.resume

    @functools.wraps(resume)
    def resumed(path: str, *args: object, **kwargs: object) -> None:
        with context(path):
            resume(path, *args, **kwargs)

    replace(runner, 'resume', resumed)


def give_dataset(loader: DataLoader, dataset: Dataset) -> None:
    """Replace the data set of a dataloader.

    torch (2.12) refuses to set the attribute of a loader that is built, so
    its check is passed by. The loader's workers must not have started.

    Args:
        loader: The dataloader; changed in place.
        dataset: The new data set. It must be as long as the old one, because
            the sampler keeps that length.
    """
    object.__setattr__(loader, 'dataset', dataset)


def end_workers(runner: Runner) -> None:
    """End the worker processes of a runner's dataloaders.

    Persistent workers live as long as their loader. Where the interpreter
    ends before, it kills them, and their temporary folders (``pymp-*``) stay.

    Args:
        runner: The runner. Its loaders start new workers when they are used
            again.
    """
    for name in ('_train_loop', '_val_loop', '_test_loop'):
        loader = getattr(getattr(runner, name, None), 'dataloader', None)
        iterator = getattr(loader, '_iterator', None)
        if iterator is not None:
            shut_down(iterator)
            loader._iterator = None


def shut_down(iterator: object) -> None:
    """End the worker processes of a dataloader's iterator, if it has any.

    Args:
        iterator: What ``iter(loader)`` returned.
    """
    getattr(iterator, '_shutdown_workers', lambda: None)()


def built_loader(runner: Runner, name: str) -> Optional[DataLoader]:
    """A dataloader that a runner has built already.

    The properties of ``Runner`` would build it.

    Args:
        runner: The runner.
        name: ``train_dataloader``, ``val_dataloader`` or ``test_dataloader``.

    Returns:
        DataLoader: The loader; None if it is not built.
    """
    loop = getattr(runner, f'_{name.partition("_")[0]}_loop', None)
    return getattr(loop, 'dataloader', None)


def empty_dataset(error: BaseException) -> Optional[Any]:
    """The data set that an error was raised for because it has no images.

    mmengine's ``BaseDataset`` joins its images by ``np.concatenate``, which
    raises a ``ValueError`` where there are none.

    Args:
        error: The error, with its traceback.

    Returns:
        The data set that was being built; None if it is another error.
    """
    if not isinstance(error, ValueError):
        return None
    if 'need at least one array' not in str(error):
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = frame.f_locals.get('self')
        if isinstance(found, BaseDataset):
            return found
    return None


def is_rpn(head: nn.Module) -> bool:
    """Whether a dense head is mmdet's ``RPNHead``, or derived from it.

    Args:
        head: The head.
    """
    from mmdet.models.dense_heads import RPNHead

    return isinstance(head, RPNHead)


def decodes_as_mmdet(head: nn.Module) -> bool:
    """Whether a head of a detector finds its boxes as mmdet's own heads do.

    That is as ``BaseDenseHead``, ``RPNHead`` or ``StandardRoIHead`` does,
    none of whose steps it overrides (mmdet 3.3.0).

    Args:
        head: A dense head, or a head of regions.
    """
    from mmdet.models.dense_heads import RPNHead
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.roi_heads import StandardRoIHead
    from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead

    def keeps(part: Any, base: type, names: Sequence[str]) -> bool:
        return isinstance(part, base) and all(
            getattr(type(part), name) is getattr(base, name) for name in names
        )

    dense = ('predict_by_feat', '_predict_by_feat_single')
    dense += ('_bbox_post_process',)
    return (
        keeps(head, RPNHead, dense)
        or keeps(head, BaseDenseHead, dense)
        or (
            keeps(head, StandardRoIHead, ('predict_bbox', '_bbox_forward'))
            and keeps(head.bbox_head, BBoxHead, dense[:2])
        )
    )


def is_building(error: BaseException) -> bool:
    """Whether an error was raised while a runner built a part of its config.

    The methods ``build_*`` of ``Runner`` do this.

    Args:
        error: The error, with its traceback.
    """
    return any(
        frame.f_globals.get('__name__') == 'mmengine.runner.runner'
        and frame.f_code.co_name.startswith('build_')
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


# Configs


def note_of(cfg: Config, name: str, default: Any = None) -> Any:
    """The value that :func:`make_note` noted in a config.

    Args:
        cfg: The config.
        name: Name of the note.
        default: The result if there is no such note.
    """
    return vars(cfg).get(name, default)


def make_note(cfg: Config, name: str, value: Any) -> None:
    """Note a value in a config without making it a field.

    ``Config.__setattr__`` would make it a field, which is written into files.
    Copies of the config keep the note.

    Args:
        cfg: The config; changed in place.
        name: Name of the note, which starts with an underscore.
        value: The value, of any type.
    """
    object.__setattr__(cfg, name, value)


def forget_filename(cfg: Config) -> None:
    """Make a config forget its file's name.

    ``Runner`` then names the config's dump by the time of the run.

    Args:
        cfg: The config; changed in place.
    """
    object.__setattr__(cfg, '_filename', None)


def files_in_text(cfg: Config) -> Set[str]:
    """The files that a config was read from: its own and its bases.

    ``Config.text`` holds the text of each file after a line with its path.

    Args:
        cfg: The config.
    """
    return {
        line
        for line in (cfg.text or '').splitlines()
        if os.path.isabs(line) and os.path.isfile(line)
    }


# Starts


def is_initializing(module: nn.Module) -> bool:
    """Whether ``init_weights`` of a module, or of one around it, is running.

    Args:
        module: The module.
    """
    return hasattr(module, '_params_init_info')


def shared_notes(module: nn.Module) -> dict:
    """The dict that all modules share while ``init_weights`` is running.

    mmengine notes in it how each parameter was initialised.

    Args:
        module: A module of the network.

    Returns:
        dict: The shared dict; a new empty one if ``init_weights`` is not
        running.
    """
    return getattr(module, '_params_init_info', {})


def initialize_children(module: nn.Module) -> None:
    """Initialise a module's children now.

    mmengine would do this after it has applied the module's own rule.

    Args:
        module: The module whose children to initialise.
    """
    for child in module.children():
        if hasattr(child, 'init_weights') and not getattr(
            child, 'is_init', False
        ):
            child.init_weights()
            child.is_init = True


def say_pretrained(module: nn.Module, checkpoint: str) -> None:
    """Tell a module that its weights are loaded.

    The hosts skip last steps such as ``zero_init_residual`` if ``init_cfg``
    has the type ``Pretrained``.

    Args:
        module: The module; changed in place.
        checkpoint: Path or address of the file that the weights come from.
    """
    module.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)


# Images


def channel_order(preprocessor: Any) -> Optional[str]:
    """The order of channels that a data preprocessor gives to the network.

    Images are read as BGR; attributes tell whether they become RGB.
    mmpretrain's preprocessors have ``to_rgb``, mmdet's and mmseg's
    ``channel_conversion``, which mmengine stores as ``_channel_conversion``.

    Args:
        preprocessor: The model's data preprocessor; None if it has none.

    Returns:
        str: ``'RGB'`` or ``'BGR'``; None if unknown.
    """
    for name in ('to_rgb', 'channel_conversion', '_channel_conversion'):
        if hasattr(preprocessor, name):
            return 'RGB' if getattr(preprocessor, name) else 'BGR'
    return None
