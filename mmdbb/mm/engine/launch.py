# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train and test classifiers, detectors and segmentors with one pair of tools.

mmpretrain, mmdet and mmseg each have tools of their own, which differ in a few
settings. The table :data:`PACKAGES` lists these settings; the config's
`default_scope` chooses the row.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import re
import tempfile
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
from mmdbb.mm.engine.blocks_hook import BlocksHook
from mmdbb.mm.engine.command import check_file
from mmdbb.mm.engine.data_check import (
    DataCheckHook,
    check_data,
    explained_data,
)
from mmdbb.mm.engine.data_paths import LOADERS, dataset_configs
from mmdbb.mm.engine.fitting import (
    FittingCheckpointHook,
    StartingCheckpointHook,
)
from mmdbb.mm.engine.mistakes import marking_mistakes
from mmdbb.mm.engine.progress import quietly
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
    end_workers,
    forget_filename,
    resume_within,
)
from mmdbb.modules import unwrapped


class Package(NamedTuple):
    """The settings in which one OpenMMLab package differs from the others.

    Attributes:
        draw: The visualization hook's argument that turns drawing on.
        show_dir: The config's field, as a dotted key, that takes the folder
            for drawn images.
        dump: The metric that writes predictions to a file.
        dataloader: Default arguments that the package's own tools give
            dataloaders.
        tta_model: Config of the model that averages predictions over
            test-time augmentation; None if the package has none.
        tta_meta: Keys of meta data that ``tta_model`` reads, beyond those
            that a test pipeline packs anyway.
    """

    draw: str
    show_dir: str
    dump: str = 'DumpResults'
    dataloader: dict = {}
    tta_model: dict | None = None
    tta_meta: tuple = ()


PACKAGES = {
    'mmpretrain': Package(
        draw='enable',
        show_dir='default_hooks.visualization.out_dir',
        dataloader=dict(collate_fn=dict(type='default_collate')),
        tta_model=dict(type='mmpretrain.AverageClsScoreTTA'),
    ),
    'mmdet': Package(
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
    'mmseg': Package(draw='draw', show_dir='visualizer.save_dir'),
}
# Settings for any other OpenMMLab package: those that most of them use.
OTHERS = Package(draw='draw', show_dir='visualizer.save_dir')


def train(config: Config, args: argparse.Namespace) -> None:
    """Train the model of `config`.

    Args:
        config: A training config, from :func:`load_config`.
        args: Parsed arguments of `tools/train.py`.

    Raises:
        UserError: If an argument does not fit the config or the machine, or
            a checkpoint is missing or does not fit.
    """
    if args.no_validate:
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
    apply_training_options(config, args.amp, args.auto_scale_lr)
    # With resume=True in the config, mmengine would trust its pointer file.
    if args.resume or (config.get('resume') and not config.get('load_from')):
        path = (
            newest_whole_checkpoint(config)
            if args.resume in (None, 'auto')
            else check_file(args.resume, 'checkpoint to resume from')
        )
        # A first run finds nothing to resume; its load_from still counts.
        config.resume = path is not None
        config.load_from = path or config.get('load_from')
    if config.get('load_from'):
        check_file(config.load_from, 'checkpoint to start from')
    check_starts(config.model, 'model')
    _check_work_dir(config.work_dir)
    check_data(config, LOADERS[: 1 if args.no_validate else 2])
    _keep_inputs(config, config.get('load_from'))
    _keep_checkpoints_whole(config)
    if args.quiet and os.environ.get('RANK', '0') == '0':
        print(_plan(config))
    with quietly(args.quiet):
        runner = build_runner(config)
        if args.repeatable:
            runner.register_hook(RepeatableHook())
        if config.get('load_from'):
            runner.register_hook(StartingCheckpointHook(config), 'LOWEST')
        _explain_resume(runner)
        _say_blocks(runner)
        if not any(isinstance(hook, DataCheckHook) for hook in runner.hooks):
            runner.register_hook(DataCheckHook())
        try:
            with explained_data():
                runner.train()
        finally:
            end_workers(runner)


def _plan(config: Config) -> str:
    """What is trained, in the lines of a table."""
    loop, loader = config.train_cfg, config.train_dataloader
    unit = 'iterations' if loop.get('max_iters') else 'epochs'
    length = loop.get('max_iters') or loop.get('max_epochs')
    optimizer = config.optim_wrapper.get('optimizer', {})
    rows = {
        'config': config.filename,
        'data': ', '.join(
            str(each.cfg.get('data_root'))
            for each in dataset_configs(config, LOADERS[:1])
        ),
        'training': f'{length} {unit}, {loader.batch_size} images in a batch',
        'optimizer': f'{optimizer.get("type")}, lr {optimizer.get("lr")}',
        'work folder': f"{config.work_dir} (mmengine's log, checkpoints)",
    }
    return '\n'.join(f'{name:<12} {value}' for name, value in rows.items())


def _check_work_dir(path: str) -> None:
    """Raise now if the work folder cannot be made or written."""
    made, folder = [], os.path.abspath(path)
    while not os.path.lexists(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        for folder in made:  # the run may still be refused
            os.rmdir(folder)
    except OSError as error:
        raise UserError(
            f'cannot write to {path}: {error.strerror}; choose another '
            '--work-dir'
        ) from error


def apply_training_options(
    config: Config, amp: bool = False, auto_scale_lr: bool = False
) -> None:
    """Change a training config as `--amp` and `--auto-scale-lr` ask.

    Args:
        config: The config; changed in place.
        amp: Whether to train in mixed precision.
        auto_scale_lr: Whether to scale the learning rate to the batch size.

    Raises:
        UserError: If the config or the machine does not allow it.
    """
    if amp:
        _enable_amp(config)
    if auto_scale_lr:
        if 'base_batch_size' not in (config.get('auto_scale_lr') or {}):
            raise UserError(
                '--auto-scale-lr needs auto_scale_lr.base_batch_size in the '
                'config'
            )
        config.auto_scale_lr.enable = True


def _say_blocks(runner: Runner) -> None:
    """Say what blocks the network has before the data sets are read."""
    hooks = (h for h in runner.hooks if isinstance(h, BlocksHook))
    hook = next(hooks, None)
    if hook is None:
        hook = BlocksHook()
        runner.register_hook(hook)
    hook.say(runner)


def _explain_resume(runner: Runner) -> None:
    """Let a state that cannot be resumed raise an error naming the file."""

    @contextlib.contextmanager
    def explained(path: str) -> Iterator[None]:
        with explained_resume(path):
            yield
            wrapper = runner.optim_wrapper
            # mmengine's wrapper for several optimizers keeps them by name;
            # runners of other packages may have no wrapper at all.
            several = getattr(wrapper, 'optim_wrappers', {None: wrapper})
            for each in several.values():
                check_resumed(getattr(each, 'optimizer', None), path)

    resume_within(runner, explained)


def check_starts(fields: object, place: str) -> None:
    """Check that the checkpoints named in ``init_cfg`` exist.

    mmengine opens them only after it has read the data sets, which can take
    minutes; here a missing file is an error at once.

    Args:
        fields: The model's config, or a part of it.
        place: Dotted key of ``fields`` in the whole config.

    Raises:
        UserError: If one is missing; the message says how to name another.
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
        what = f'training configs/{run[1]}.py writes it'
    else:
        what = 'no file'
    raise UserError(
        f'{place} starts from {path}, which does not exist ({what}); name '
        f'yours by --cfg-options {place}.checkpoint=PATH; docs/recipes.md has '
        "other starts (the papers' files, plain weights, from scratch)"
    )


def _keep_inputs(
    config: Config, checkpoint: str | None, out: str | None = None
) -> None:
    """Raise if a run would overwrite one of its input files.

    mmengine itself writes a file too: the config with all changes, in the
    work folder, under the name of the config's file.

    Args:
        config: The config, from :func:`load_config`.
        checkpoint: Path of the weights that are read, if any.
        out: Path of the predictions to write, if any.

    Raises:
        UserError: If an input would be overwritten. The message names it.
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
    # The user runs the config that mmengine wrote to the work folder. That
    # file is kept; the new dump is named by the time of the run instead.
    forget_filename(config)


def _is_one_of(path: str, inputs: Iterable[str]) -> bool:
    """Whether a path leads to one of some files, by any kind of link."""
    for other in inputs:
        if os.path.realpath(path) == os.path.realpath(other):
            return True
        try:
            if os.path.samefile(path, other):
                return True
        except (OSError, ValueError):  # no such file yet, or an address
            continue
    return False


def _is_dump(path: str) -> bool:
    """Whether mmengine wrote this config file."""
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
        UserError: If an argument or the checkpoint does not fit the config.
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
    _check_work_dir(config.work_dir)
    check_data(config, ('test_dataloader',))
    if args.show or args.show_dir:
        _enable_drawing(config, args)
    if args.tta:
        _enable_tta(config)
    with quietly(args.quiet):
        found = _tested(config, args)
    if args.quiet and os.environ.get('RANK', '0') == '0':
        width = max(map(len, found), default=0)
        for name, value in found.items():
            print(f'{name:<{width}}  {value:.4f}')
        print(f"mmengine's log: {config.work_dir}")
    return found


def _tested(config: Config, args: argparse.Namespace) -> dict:
    runner = build_runner(config)
    runner.register_hook(FittingCheckpointHook(args.checkpoint), 'LOWEST')
    if '://' not in args.checkpoint:
        give_structure_(
            unwrapped(runner.model), read_checkpoint(args.checkpoint)
        )
    if args.out:
        dump = dict(type=_package(config).dump, out_file_path=args.out)
        runner.test_evaluator.metrics.append(METRICS.build(dump))
    try:
        with marking_mistakes(runner.visualizer), explained_data():
            return runner.test()
    finally:
        end_workers(runner)


def build_runner(config: Config) -> Runner:
    """Build the config's runner.

    Dataloaders get the default arguments of the OpenMMLab package's own tools.

    Args:
        config: The config; its dataloaders are changed in place.

    Raises:
        UserError: If the launcher needs GPUs and the machine has none, or the
            launcher did not start this process.
    """
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = config.get(name)
        if loader is not None:
            for key, value in _package(config).dataloader.items():
                loader.setdefault(key, value)
    launcher = config.get('launcher', 'none')
    if launcher != 'none' and get_device() == 'cpu':
        raise UserError(f'--launcher {launcher} needs GPUs; none was found')
    started = LAUNCHED.get(launcher)
    if started and started not in os.environ:
        raise UserError(
            f'--launcher {launcher} is for processes that it started; in this '
            f'one {started} is not set'
        )
    if 'runner_type' in config:
        return RUNNERS.build(config)
    return Runner.from_cfg(config)


def _package(config: Config) -> Package:
    return PACKAGES.get(config.get('default_scope'), OTHERS)


def _enable_amp(config: Config) -> None:
    """Switch the config to mixed precision with dynamic loss scaling."""
    kind = config.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(
            f'--amp can replace only OptimWrapper; optim_wrapper.type of '
            f'the config is {kind}'
        )
    if get_device() == 'cpu':
        raise UserError('--amp needs a GPU; none was found')
    config.optim_wrapper.type = 'AmpOptimWrapper'
    config.optim_wrapper.setdefault('loss_scale', 'dynamic')


def _enable_drawing(config: Config, args: argparse.Namespace) -> None:
    package = _package(config)
    hook = config.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UserError(
            '--show and --show-dir need default_hooks.visualization in the '
            'config'
        )
    hook[package.draw] = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    hook.interval = args.interval
    if args.show_dir:
        config.merge_from_dict({package.show_dir: args.show_dir})


def _enable_tta(config: Config) -> None:
    """Switch the config to predictions averaged over test-time augmentation.

    The config's own `tta_model` and `tta_pipeline` are used if it has them.
    The default is the package's `tta_model` on the image and its mirror image.
    """
    package = _package(config)
    model = config.get('tta_model', package.tta_model)
    if model is None:
        raise UserError('--tta needs tta_model in the config')
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:  # a wrapper
        dataset = dataset.dataset
    pipeline = config.get('tta_pipeline')
    if pipeline is None:
        *pipeline, pack = copy.deepcopy(dataset.pipeline)
        if package.tta_meta:
            usual = pack.get(
                'meta_keys',
                ('img_id', 'img_path', 'ori_shape', 'img_shape')
                + ('scale_factor',),
            )
            pack.meta_keys = (*usual, *package.tta_meta)
        flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        pipeline.append(dict(type='TestTimeAug', transforms=[flips, [pack]]))
    dataset.pipeline = pipeline
    config.model = ConfigDict(**model, module=config.model)
