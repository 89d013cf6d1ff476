# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""One way to train and to test for the three tasks.

The tools of mmpretrain, mmdet and mmseg differ where their packages do. What
differs stands in one table here, chosen by the config's `default_scope`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import re
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import METRICS, RUNNERS
from mmengine.runner import Runner

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.mm.config_files import files_of
from mmdbb.mm.deploy.load import give_structure_
from mmdbb.mm.engine.command import check_file
from mmdbb.mm.engine.fitting import (
    FittingCheckpointHook,
    StartingCheckpointHook,
    unwrapped,
)
from mmdbb.mm.engine.repeatable import RepeatableHook
from mmdbb.mm.engine.resume import (
    check_resumed,
    explained_resume,
    newest_whole_checkpoint,
)
from mmdbb.mm.engine.whole_checkpoints import WholeCheckpointHook
from mmdbb.mm.host_internals import (
    DET_TTA_MODEL,
    LAUNCHED,
    forget_filename,
    resume_within,
)


class Task(NamedTuple):
    """What a host package does in its own way.

    Attributes:
        draw: The visualization hook's argument that turns drawing on.
        show_dir: Where the folder for drawn images goes: a path in the
            config.
        dump: The metric that writes predictions to a file.
        dataloader: Arguments that the host's own tools give dataloaders.
        tta_model: The default way to merge test-time augmentation.
        tta_meta: Meta data that its inputs must carry, beyond the usual.
    """

    draw: str
    show_dir: str
    dump: str = 'DumpResults'
    dataloader: dict = {}
    tta_model: dict | None = None
    tta_meta: tuple = ()


TASKS = {
    'mmpretrain': Task(
        draw='enable',
        show_dir='default_hooks.visualization.out_dir',
        dataloader=dict(collate_fn=dict(type='default_collate')),
        tta_model=dict(type='mmpretrain.AverageClsScoreTTA'),
    ),
    'mmdet': Task(
        draw='draw',
        show_dir='default_hooks.visualization.test_out_dir',
        dump='mmdet.DumpDetResults',
        tta_model=dict(
            type=DET_TTA_MODEL,
            tta_cfg=dict(
                nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
            ),
        ),
        tta_meta=('flip', 'flip_direction'),
    ),
    'mmseg': Task(draw='draw', show_dir='visualizer.save_dir'),
}
# Another package of the family: what most of them do.
OTHERS = Task(draw='draw', show_dir='visualizer.save_dir')


def train(config: Config, args: argparse.Namespace) -> None:
    """Train the model of `config`.

    Args:
        config: A training config, from :func:`load_config`.
        args: Parsed arguments of `tools/train.py`.

    Raises:
        UserError: An argument does not fit the config or the machine.
    """
    if args.no_validate:
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
    if args.amp:
        _enable_amp(config)
    if args.auto_scale_lr:
        if 'base_batch_size' not in config.get('auto_scale_lr', {}):
            raise UserError(
                '--auto-scale-lr needs auto_scale_lr.base_batch_size in the '
                'config'
            )
        config.auto_scale_lr.enable = True
    # mmengine would believe its pointer where the config says so.
    if args.resume or (config.get('resume') and not config.get('load_from')):
        path = (
            newest_whole_checkpoint(config)
            if args.resume in (None, 'auto')
            else check_file(args.resume, 'checkpoint to resume from')
        )
        # A first start has nothing to resume, but weights to start from.
        config.resume = path is not None
        config.load_from = path or config.get('load_from')
    if config.get('load_from'):
        check_file(config.load_from, 'checkpoint to start from')
    check_starts(config.model, 'model')
    _keep_inputs(config, config.get('load_from'))
    _keep_checkpoints_whole(config)
    runner = build_runner(config)
    if args.repeatable:
        runner.register_hook(RepeatableHook())
    if config.get('load_from'):
        runner.register_hook(StartingCheckpointHook(config), 'LOWEST')
    _explain_resume(runner)
    runner.train()


def _explain_resume(runner: Runner) -> None:
    """Let a state that does not fit be a mistake of the checkpoint."""

    @contextlib.contextmanager
    def explained(path: str) -> Iterator[None]:
        with explained_resume(path):
            yield
            wrapper = runner.optim_wrapper
            # Several are kept by name; others' runners have none of these.
            several = getattr(wrapper, 'optim_wrappers', {None: wrapper})
            for each in several.values():
                check_resumed(getattr(each, 'optimizer', None), path)

    resume_within(runner, explained)


def check_starts(fields: object, place: str) -> None:
    """Check that the checkpoints exist that a model's parts start from.

    Before the data are read: mmengine asks for them after that.

    Args:
        fields: The model's config, or a part of it.
        place: Where it stands in the whole config.

    Raises:
        UserError: If one is missing; the message says what there is to do.
    """
    if isinstance(fields, (list, tuple)):
        for i, item in enumerate(fields):
            check_starts(item, f'{place}.{i}')
        return
    if not isinstance(fields, dict):
        return
    for key, value in fields.items():
        check_starts(value, f'{place}.{key}')
    path = fields.get('checkpoint')
    in_init_cfg = re.search(r'\.init_cfg(\.\d+)?$', place)
    if not (in_init_cfg and isinstance(path, str)) or '://' in path:
        return
    if Path(path).expanduser().is_file():
        return
    run = re.fullmatch(r'work_dirs/([\w.-]+)/\w+\.pth', path)
    if run and Path('configs', f'{run[1]}.py').is_file():
        what = f'what training configs/{run[1]}.py writes'
    else:
        what = 'no file'
    raise UserError(
        f'{place} starts from {path}, which does not exist ({what}); name '
        f'yours by --cfg-options {place}.checkpoint=PATH; other starts (the '
        "papers' files, plain weights, from scratch) stand in docs/recipes.md"
    )


def _keep_inputs(
    config: Config, checkpoint: str | None, out: str | None = None
) -> None:
    """Refuse to write over what is read.

    mmengine writes the config, as it is then, to the work folder, under the
    name of its file.

    Args:
        config: From :func:`load_config`.
        checkpoint: Path of the weights, if any.
        out: Path of the predictions to write, if any.

    Raises:
        UserError: It names the file.
    """
    inputs = [*files_of(config), *([checkpoint] if checkpoint else [])]
    if out and _is_one_of(out, inputs):
        raise UserError(f'--out {out} is also an input')
    if not config.filename:
        return
    copy = os.path.join(config.work_dir, os.path.basename(config.filename))
    if not _is_one_of(copy, inputs):
        return
    if not _is_dump(config.filename) or not _is_one_of(
        copy, [config.filename]
    ):
        raise UserError(
            f'the config as it is run would be written over {copy}, which is '
            'an input; choose another --work-dir'
        )
    # Work folders are tested and resumed by what mmengine wrote there: it is
    # kept, and the config as it is run gets the name of its time.
    forget_filename(config)


def _is_one_of(path: str, inputs: Iterable[str]) -> bool:
    """Whether a path leads to one of some files, by links of any kind."""
    for other in inputs:
        if os.path.realpath(path) == os.path.realpath(other):
            return True
        try:
            if os.path.samefile(path, other):
                return True
        except (OSError, ValueError):  # there is none yet, or an address
            continue
    return False


def _is_dump(path: str) -> bool:
    """Whether a config is one that mmengine wrote."""
    with open(path, encoding='utf-8') as file:
        text = file.read()
    config = Config.fromfile(path, import_custom_modules=False)
    return text.strip() == config.pretty_text.strip()


def _keep_checkpoints_whole(config: Config) -> None:
    hook = (config.get('default_hooks') or {}).get('checkpoint')
    if hook and hook.get('type') == 'CheckpointHook':
        hook.type = WholeCheckpointHook.__name__


def test(config: Config, args: argparse.Namespace) -> dict:
    """Evaluate a checkpoint on the config's test set.

    Args:
        config: A test config, from :func:`load_config`.
        args: Parsed arguments of `tools/test.py`.

    Returns:
        The metrics by name.

    Raises:
        UserError: An argument does not fit the config.
    """
    config.load_from = check_file(args.checkpoint, 'checkpoint')
    config.resume = False
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise UserError(
            f'--out takes a file that ends in .pkl or .pickle; got {args.out}'
        )
    _keep_inputs(config, args.checkpoint, args.out)
    if config.get('test_dataloader') is None:
        raise UserError('the config has no test_dataloader')
    if args.show or args.show_dir:
        _enable_drawing(config, args)
    if args.tta:
        _enable_tta(config)
    runner = build_runner(config)
    runner.register_hook(FittingCheckpointHook(args.checkpoint), 'LOWEST')
    if '://' not in args.checkpoint:
        give_structure_(
            unwrapped(runner.model), read_checkpoint(args.checkpoint)
        )
    if args.out:
        dump = dict(type=_task(config).dump, out_file_path=args.out)
        runner.test_evaluator.metrics.append(METRICS.build(dump))
    return runner.test()


def build_runner(config: Config) -> Runner:
    """Build the config's runner, its dataloaders as the host's tools do.

    Raises:
        UserError: The launcher needs GPUs and the machine has none.
    """
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = config.get(name)
        if loader is not None:
            for key, value in _task(config).dataloader.items():
                loader.setdefault(key, value)
    launcher = config.get('launcher', 'none')
    if launcher != 'none' and get_device() == 'cpu':
        raise UserError(f'--launcher {launcher} needs GPUs; none was found')
    started = LAUNCHED.get(launcher)
    if started and started not in os.environ:
        raise UserError(
            f'--launcher {launcher} needs the environment of its processes; '
            f'{started} is not set'
        )
    if 'runner_type' in config:
        return RUNNERS.build(config)
    return Runner.from_cfg(config)


def _task(config: Config) -> Task:
    return TASKS.get(config.get('default_scope'), OTHERS)


def _enable_amp(config: Config) -> None:
    """Train in mixed precision, the loss scaled dynamically."""
    kind = config.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(
            f'--amp takes the place of OptimWrapper; optim_wrapper.type of '
            f'the config is {kind}'
        )
    if get_device() == 'cpu':
        raise UserError('--amp needs a GPU; none was found')
    config.optim_wrapper.type = 'AmpOptimWrapper'
    config.optim_wrapper.setdefault('loss_scale', 'dynamic')


def _enable_drawing(config: Config, args: argparse.Namespace) -> None:
    task = _task(config)
    hook = config.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UserError(
            '--show and --show-dir need default_hooks.visualization in the '
            'config'
        )
    hook[task.draw] = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    hook.interval = args.interval
    if args.show_dir:
        config.merge_from_dict({task.show_dir: args.show_dir})


def _enable_tta(config: Config) -> None:
    """Average predictions over test-time augmentation.

    The config's own `tta_model` and `tta_pipeline`, or else flipping, where
    the host has a model that merges it.
    """
    task = _task(config)
    model = config.get('tta_model', task.tta_model)
    if model is None:
        raise UserError('--tta needs tta_model in the config')
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:  # a wrapper
        dataset = dataset.dataset
    pipeline = config.get('tta_pipeline')
    if pipeline is None:
        *pipeline, pack = copy.deepcopy(dataset.pipeline)
        if task.tta_meta:
            usual = pack.get(
                'meta_keys',
                ('img_id', 'img_path', 'ori_shape', 'img_shape')
                + ('scale_factor',),
            )
            pack.meta_keys = (*usual, *task.tta_meta)
        flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        pipeline.append(dict(type='TestTimeAug', transforms=[flips, [pack]]))
    dataset.pipeline = pipeline
    config.model = ConfigDict(**model, module=config.model)
