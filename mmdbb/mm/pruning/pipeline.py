# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merge a trained checkpoint, prune its filters, and fine-tune the rest."""

from __future__ import annotations

import math
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
from mmengine.runner import Runner
from torch import nn

from mmdbb.errors import UserError
from mmdbb.mm.deploy.merge import merge_checkpoint
from mmdbb.mm.engine.measure import print_table
from mmdbb.mm.evaluation.figures import evaluate, quiet_runner
from mmdbb.mm.evaluation.images import default_size
from mmdbb.mm.evaluation.metric import Figure, Metric
from mmdbb.mm.evaluation.norm_statistics import calibrate_norms_
from mmdbb.mm.export.modules import is_detector
from mmdbb.mm.export.network import ExportOptions, write_network
from mmdbb.mm.outputs import Proof, Source, output_paths, writing
from mmdbb.mm.pruning.fine_tuning import (
    PruneOptions,
    check_fine_tuning,
    give_network,
    train_on_,
)
from mmdbb.mm.pruning.structure import (
    Cost,
    cost_of,
    prune_,
    require_torch_pruning,
)
from mmdbb.mm.structure import Structure


class PruningStage(NamedTuple):
    """The network's accuracy and cost after one step of the pipeline.

    Attributes:
        name: The step: ``merged``, ``pruned`` or ``trained on``.
        figure: Result of the config's evaluator.
        cost: Numbers of parameters and operations.
    """

    name: str
    figure: Figure
    cost: Cost


class Pruned(NamedTuple):
    """Result of :func:`prune_checkpoint`: the files, and how good they are.

    Attributes:
        checkpoint: Path of the pruned weights.
        config: Path of the stock network's config.
        onnx: Path of the exported network; None if no export was asked for.
        filters: Numbers of filters before and after pruning.
        stages: Accuracy and cost of the network when merged, when pruned,
            and, if it was fine-tuned, after that.
    """

    checkpoint: str
    config: str
    onnx: Optional[str]
    filters: Tuple[int, int]
    stages: List[PruningStage]


def prune_checkpoint(
    source: Source,
    out: str,
    options: Optional[PruneOptions] = None,
    onnx: Optional[str] = None,
    image_size: Optional[Tuple[int, int]] = None,
    metric: Optional[Metric] = None,
    overwrite: bool = False,
) -> Pruned:
    """Merge a trained network, prune its filters, fine-tune and export it.

    The config's evaluator measures the network after each step.

    Args:
        source: The trained checkpoint, with blocks, and its config.
        out: Path of the checkpoint to write, ``*.pth`` or
            ``*.safetensors``; the stock network's config is written beside it
            as ``*.py``.
        options: How to prune and to fine-tune.
        onnx: Path of an ONNX file to write as well, ``*.onnx``.
        image_size: Height and width in pixels of the image on which
            operations are counted, and which the ONNX file takes; by default
            the smallest that holds all images of the test set.
        metric: The evaluator's figure to report; by default its main one.
        overwrite: Whether existing outputs may be replaced.

    Returns:
        Pruned: Paths of the files, with the accuracy and cost of each stage.

    Raises:
        UserError: If an input is wrong, or the network cannot be pruned.
            Nothing is written then.
    """
    options = options or PruneOptions()
    _check(source, options, onnx)
    metric = metric or Metric()
    metric.check()
    checkpoint, config = output_paths(out)
    outputs = (checkpoint, config, *([onnx] if onnx else []))
    with writing(source, *outputs, overwrite=overwrite) as drafts:
        merged = merge_checkpoint(source)
        model, contents = merged.network.float(), merged.contents
        size = image_size or default_size(source.cfg, model)
        calibrate_norms_(model, options.calibration.images(source.cfg, model))
        before, stages = _count_filters(model), []
        # The runner takes data and evaluator from the config; ``_stage``
        # replaces the network that it built by ``model``.
        with quiet_runner(contents.cfg) as runner:
            stages.append(_stage('merged', runner, model, size, metric))
            metric = stages[0].figure.metric
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
            train_on_(model, contents.cfg, source.cfg, options)
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
                ExportOptions(head=is_detector(model)),
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


def _check(source: Source, options: PruneOptions, onnx: Optional[str]) -> None:
    """Raise before the long work starts if a package or value is wrong."""
    require_torch_pruning()
    if not 0 < options.ratio < 1:
        raise UserError(
            f'the ratio must lie between 0 and 1, got {options.ratio:g}'
        )
    length = options.length
    if not (0 <= length < 1 or (1 <= length < math.inf and length % 1 == 0)):
        raise UserError(
            'the length must be a whole number of epochs or iterations, or a '
            f'share of the schedule below 1, got {length:g}'
        )
    if not options.lr_scale > 0:
        raise UserError(
            'the learning rate must be scaled by more than 0, got '
            f'{options.lr_scale:g}'
        )
    if onnx is not None and not onnx.endswith('.onnx'):
        raise UserError(f'the export must end in .onnx, got {onnx}')
    if length:
        check_fine_tuning(source.config, options)


def _stage(
    name: str,
    runner: Runner,
    model: nn.Module,
    size: Tuple[int, int],
    metric: Metric,
) -> PruningStage:
    give_network(runner, model)
    figure = evaluate(runner, metric=metric)
    with torch.no_grad():
        return PruningStage(name, figure, cost_of(model.eval(), size))


def _count_filters(model: nn.Module) -> int:
    return sum(
        m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Conv2d)
    )


def print_pruned(result: Pruned) -> None:
    """Print a table with one column for each stage, and the files' paths.

    Args:
        result: What :func:`prune_checkpoint` returned.
    """
    stages = result.stages
    rows: List[Tuple[str, Callable[[PruningStage], str]]] = [
        (
            stages[0].figure.title,
            lambda stage: f'{stage.figure.points:.2f}',
        ),
        ('parameters', lambda stage: f'{stage.cost.parameters:,}'),
        ('MFLOPs', lambda stage: f'{stage.cost.flops / 1e6:,.2f}'),
    ]
    before, after = result.filters
    print_table(
        ('', *(stage.name for stage in stages)),
        [(title, *map(cell, stages)) for title, cell in rows],
        f'{before - after} of {before} filters removed. FLOPs are for one '
        'image; a multiplication and an addition count as two.',
    )
    print(f'weights: {result.checkpoint}')
    print(f'config:  {result.config}')
    if result.onnx:
        print(f'ONNX:    {result.onnx}')
