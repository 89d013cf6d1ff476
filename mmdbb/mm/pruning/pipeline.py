# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to a smaller network: merge, prune, train on."""

from __future__ import annotations

import copy
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from mmdbb.errors import UserError
from mmdbb.mm.deploy.merge import merge_checkpoint
from mmdbb.mm.engine.launch import build_runner
from mmdbb.mm.engine.measure import print_table
from mmdbb.mm.evaluation.figures import Figure, evaluate, quiet_runner
from mmdbb.mm.evaluation.images import Calibration, first_size
from mmdbb.mm.evaluation.norm_statistics import calibrate_norms_
from mmdbb.mm.export.modules import Detector, export_module
from mmdbb.mm.export.network import ExportOptions, write_network
from mmdbb.mm.host_internals import replaced
from mmdbb.mm.outputs import Proof, Source, output_paths, writing
from mmdbb.mm.pruning.structure import (
    Cost,
    cost_of,
    prune_,
    require_torch_pruning,
)
from mmdbb.mm.structure import Structure


class Stage(NamedTuple):
    """A network on its way to fewer filters.

    Attributes:
        name: ``merged``, ``pruned`` or ``trained on``.
        figure: What the config's evaluator says of it.
        cost: Parameters and operations.
    """

    name: str
    figure: Figure
    cost: Cost


class Pruned(NamedTuple):
    """What :func:`prune_checkpoint` wrote.

    Attributes:
        checkpoint: Path of the weights.
        config: Path of the config, that of the stock network.
        onnx: Path of the exported network; None if not asked for.
        filters: How many filters the network had, and has.
        stages: The network before, between and after.
    """

    checkpoint: str
    config: str
    onnx: Optional[str]
    filters: Tuple[int, int]
    stages: List[Stage]


class PruneOptions(NamedTuple):
    """How a network is pruned, and trained on afterwards.

    Attributes:
        ratio: Share of the filters to remove, between 0 and 1.
        each_layer: Whether each layer loses the same share; else filters are
            compared across layers.
        norm: Order of the norm that measures a filter, 1 or 2.
        round_to: What the numbers of channels are to be multiples of.
        length: For how long to train on, in what the config's training counts
            in, epochs or iterations; 0 for not at all.
        lr_scale: Learning rate of that, as a share of the config's; it falls
            to zero along a cosine.
        calibration: Which images give the merged network's norms their
            statistics.
    """

    ratio: float = 0.3
    each_layer: bool = False
    norm: int = 2
    round_to: Optional[int] = None
    length: int = 0
    lr_scale: float = 0.1
    calibration: Calibration = Calibration()


def prune_checkpoint(
    source: Source,
    out: str,
    options: Optional[PruneOptions] = None,
    onnx: Optional[str] = None,
    image_size: Optional[Tuple[int, int]] = None,
    metric: Optional[str] = None,
    overwrite: bool = False,
) -> Pruned:
    """Merge a trained network, prune its filters, train it on, export it.

    Args:
        source: The trained checkpoint, with blocks, and its config.
        out: Path of the checkpoint to write, ``*.pth`` or
            ``*.safetensors``; the stock network's config is written beside it
            as ``*.py``.
        options: How to prune and to train on.
        onnx: Path of an ONNX file to export to as well, ``*.onnx``.
        image_size: Height and width in pixels, by default those of the first
            image of the test set.
        metric: The evaluator's figure, by default its main one.
        overwrite: Whether existing outputs may be replaced.

    Raises:
        UserError: If an input is wrong, or the network cannot be pruned.
            Nothing is written then.
    """
    options = options or PruneOptions()
    _check(options, onnx)
    checkpoint, config = output_paths(out)
    outputs = (checkpoint, config, *([onnx] if onnx else []))
    with writing(source, *outputs, overwrite=overwrite) as drafts:
        merged = merge_checkpoint(source)
        model, contents = merged.network.float(), merged.contents
        size = image_size or first_size(source.cfg, model)
        calibrate_norms_(model, options.calibration.images(source.cfg, model))
        before, stages = _count_filters(model), []
        # Heads and layers come from the config; this network's own from here.
        with quiet_runner(contents.cfg) as runner:
            stages.append(_stage('merged', runner, model, size, metric))
            prune_(
                model,
                options.ratio,
                size,
                options.each_layer,
                options.norm,
                options.round_to,
            )
            stages.append(_stage('pruned', runner, model, size, metric))
        if options.length:
            train_on_(
                model,
                contents.cfg,
                source.cfg,
                options.length,
                options.lr_scale,
            )
            with quiet_runner(contents.cfg) as runner:
                stages.append(
                    _stage('trained on', runner, model, size, metric)
                )
        model.cpu().eval()
        contents = contents._replace(
            state=model.state_dict(),
            structure=Structure.PRUNED,
            dtypes=None,
            notes=dict(
                ratio=options.ratio,
                points={s.name: s.figure.points for s in stages},
            ),
        )
        drafts.write(contents)
        if onnx:
            write_network(
                model,
                drafts.paths[2],
                ExportOptions(head=isinstance(export_module(model), Detector)),
                Proof(image_size=size),
                notes=source.notes(contents.structure, contents.weights),
            )
    return Pruned(
        checkpoint=checkpoint,
        config=config,
        onnx=onnx,
        filters=(before, _count_filters(model)),
        stages=stages,
    )


def _check(options: PruneOptions, onnx: Optional[str]) -> None:
    """Raise before the work if a package is missing or a value not allowed."""
    require_torch_pruning()
    if not 0 < options.ratio < 1:
        raise UserError(
            f'the ratio must lie between 0 and 1, got {options.ratio:g}'
        )
    if options.length < 0:
        raise UserError(f'the length must be at least 0, got {options.length}')
    if not options.lr_scale > 0:
        raise UserError(
            'the learning rate must be scaled by more than 0, got '
            f'{options.lr_scale:g}'
        )
    if onnx is not None and not onnx.endswith('.onnx'):
        raise UserError(f'the export must end in .onnx, got {onnx}')


def train_on_(
    model: nn.Module,
    stock_cfg: Config,
    cfg: Config,
    length: int,
    lr_scale: float,
) -> None:
    """Train a network as a config says, but its own way through it.

    Args:
        model: The network; changed in place.
        stock_cfg: Config with the data, the loops and the optimizer.
        cfg: Config with the work folder.
        length: Epochs or iterations, as the config's training counts.
        lr_scale: Share of the config's learning rate.

    Raises:
        UserError: If the config cannot train.
    """
    stock_cfg = copy.deepcopy(stock_cfg)
    stock_cfg.work_dir = cfg.get('work_dir', 'work_dirs/pruned')
    loop = stock_cfg.get('train_cfg')
    if not loop or stock_cfg.get('train_dataloader') is None:
        raise UserError('the config has no training to go on with')
    by_epoch = 'max_iters' not in loop
    loop['max_epochs' if by_epoch else 'max_iters'] = length
    loop['val_interval'] = length
    cosine = dict(type='CosineAnnealingLR', T_max=length, by_epoch=by_epoch)
    if by_epoch:
        cosine['convert_to_iter_based'] = True
    stock_cfg.param_scheduler = [cosine]
    stock_cfg.optim_wrapper.optimizer.lr *= lr_scale
    # The result is written by the caller.
    stock_cfg.val_cfg = stock_cfg.val_dataloader = None
    stock_cfg.val_evaluator = None
    stock_cfg.default_hooks.checkpoint = None
    runner = build_runner(stock_cfg)
    _give(runner, model)
    # These are the weights.
    with replaced(model, 'init_weights', _nothing):
        runner.train()


def _nothing() -> None:
    """In the place of an initialisation."""


def _give(runner: Runner, model: nn.Module) -> None:
    runner.model = runner.wrap_model(
        runner.cfg.get('model_wrapper_cfg'), model
    )


def _stage(
    name: str,
    runner: Runner,
    model: nn.Module,
    size: Tuple[int, int],
    metric: Optional[str],
) -> Stage:
    _give(runner, model)
    figure = evaluate(runner, name=metric)
    with torch.no_grad():
        return Stage(name, figure, cost_of(model.eval(), size))


def _count_filters(model: nn.Module) -> int:
    return sum(
        m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Conv2d)
    )


def print_pruned(result: Pruned) -> None:
    """Print the stages of a network side by side.

    Args:
        result: From :func:`prune_checkpoint`.
    """
    stages = result.stages
    rows: List[Tuple[str, Callable[[Stage], str]]] = [
        (
            f'{stages[0].figure.name} (points)',
            lambda stage: f'{stage.figure.points:.2f}',
        ),
        ('parameters', lambda stage: f'{stage.cost.parameters:,}'),
        ('MFLOPs', lambda stage: f'{stage.cost.flops / 1e6:,.2f}'),
    ]
    before, after = result.filters
    print_table(
        ('', *(stage.name for stage in stages)),
        [(title, *map(cell, stages)) for title, cell in rows],
        f'{before - after} of {before} filters removed. FLOPs of one image, '
        'two for a product and a sum.',
    )
    print(f'weights: {result.checkpoint}')
    print(f'config:  {result.config}')
    if result.onnx:
        print(f'ONNX:    {result.onnx}')
