# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The report on a checkpoint and the config that it was trained with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.mm.deploy.images import given_batch, random_batch
from mmdbb.mm.deploy.merge import trained_network
from mmdbb.mm.evaluation.figures import evaluate, quiet_runner
from mmdbb.mm.evaluation.images import calibration_images
from mmdbb.mm.evaluation.metric import Figure, Metric
from mmdbb.mm.outputs import Source, writing
from mmdbb.report.figures import Report
from mmdbb.report.measure import ReportOptions, network_report
from mmdbb.report.page import page
from mmdbb.report.write import check_ending

#: Height and width in pixels of images that are not of the data set.
SIZE = (224, 224)


class CheckpointReportOptions(NamedTuple):
    """On which images to measure, and what.

    Attributes:
        images: Paths of images.
        data: Number of images to take from the config's test set instead.
            With neither, two random images serve.
        image_size: Height and width in pixels. By default 224 x 224, or for
            the test set the size of its first image.
        evaluated: Whether to run the config's evaluator: on the merged
            network, and on it without each kind of branch.
        metric: The evaluator's figure to report; by default its main one.
        drop: Whether to run the network without each branch.
        title: Heading of the page; by default the config's name.
        progress: Called with a line of text before each part of the work.
    """

    images: Sequence[str] = ()
    data: int = 0
    image_size: Optional[Tuple[int, int]] = None
    evaluated: bool = False
    metric: Optional[Metric] = None
    drop: bool = True
    title: str = ''
    progress: Optional[Callable[[str], None]] = None


def report_checkpoint(
    source: Source,
    out: str,
    options: Optional[CheckpointReportOptions] = None,
    overwrite: bool = False,
) -> Report:
    """Write a page on what the branches of a checkpoint's network did.

    Args:
        source: The trained checkpoint, with blocks, and its config.
        out: Path of the page, ``*.html``.
        options: On which images to measure, and what.
        overwrite: Whether an existing file may be replaced.

    Returns:
        Report: The figures in the page.

    Raises:
        UserError: If an input is wrong or the page cannot be written. Nothing
            is written then.
    """
    options, out = options or CheckpointReportOptions(), os.fspath(out)
    try:
        check_ending(out)
    except ValueError as error:
        raise UserError(str(error).replace('path', 'the page', 1)) from error
    if options.images and options.data:
        raise UserError('take images from files or from the data, not both')
    inputs = tuple(options.images)
    with writing(source, out, inputs=inputs, overwrite=overwrite) as drafts:
        report = _measured(source, options)
        Path(drafts.paths[0]).write_text(page(report), encoding='utf-8')
    return report


def _measured(source: Source, options: CheckpointReportOptions) -> Report:
    cfg, loaded = source.config, source.read()
    network = trained_network(cfg, loaded['state_dict'], source.checkpoint)
    network = network.float().eval()
    images, which = _images(source, network, options)
    name = Path(cfg.filename).stem if cfg.filename else ''
    facts = {
        'Network': _network(network),
        'Config': f'{name}.py' if name else '',
        'Checkpoint': os.path.basename(source.checkpoint),
        'Weights': loaded['weights'],
        'Images': f'{which}, {images.shape[-2]} × {images.shape[-1]} pixels',
    }
    scores: List[Figure] = []
    asked = ReportOptions(
        title=options.title or name or type(network).__name__,
        facts={key: value for key, value in facts.items() if value},
        drop=options.drop,
        progress=options.progress,
    )
    if not options.evaluated:
        return _reported(network, images, asked, source)
    with quiet_runner(cfg) as runner:
        parameter = next(runner.model.parameters())

        def score(merged: nn.Module) -> float:
            runner.model = merged.to(parameter.device)
            scores.append(evaluate(runner, metric=options.metric))
            return scores[-1].points

        asked = asked._replace(evaluate=score)
        report = _reported(network, images, asked, source)
    return report._replace(metric=scores[0].title)


def _reported(
    network: nn.Module, images: Tensor, asked: ReportOptions, source: Source
) -> Report:
    try:
        return network_report(network, images, asked)
    except ValueError as error:  # a kernel that is not finite, say
        raise UserError(f'{source.checkpoint}: {error}') from error


def _images(
    source: Source, network: nn.Module, options: CheckpointReportOptions
) -> Tuple[Tensor, str]:
    """The images, and which they are in words."""
    size = options.image_size or SIZE
    if options.data:
        images = calibration_images(
            source.config, network, options.data, 'test', options.image_size
        )
        return images, f'{len(images)} of the test set'
    if options.images:
        batches = [given_batch(network, p, size) for p in options.images]
        return torch.cat(batches), f'{len(batches)} given'
    return random_batch(network, size, seed=0), '2 random ones'


def _network(network: nn.Module) -> str:
    """The classes of the network and its parts."""
    parts = [
        type(part).__name__
        for name in ('backbone', 'neck', 'head', 'bbox_head', 'decode_head')
        if isinstance(part := getattr(network, name, None), nn.Module)
    ]
    inside = f' ({", ".join(parts)})' if parts else ''
    return f'{type(network).__name__}{inside}'
