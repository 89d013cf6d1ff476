# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The demo's table: the trained network beside the one it became."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Dict, Sequence

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor, nn

from mmdbb.compare import compare_networks, network_outputs
from mmdbb.files.checkpoints import load_strictly, read_checkpoint
from mmdbb.mm.deploy.load import build_model, load_deployed
from mmdbb.mm.engine.measure import interleaved_latency, print_table
from mmdbb.modules import count_parameters


def report(
    task: str,
    spec,
    config: Config,
    checkpoint: str,
    work: Path,
    found: Dict[str, float],
) -> None:
    """Compare the two networks, print the table, draw the predictions.

    Args:
        task: Name of the demo's task.
        spec: Its entry in ``workshop.demo.run.TASKS``.
        config: The training config.
        checkpoint: Path of the trained checkpoint.
        work: The folder with ``deploy.py`` and ``deploy.pth``, which gets
            ``predictions.png``.
        found: The metric before and after merging.
    """
    from workshop.demo.picture import draw

    trained = build_model(config)
    loaded = read_checkpoint(checkpoint)
    load_strictly(trained, loaded['state_dict'], checkpoint)
    stock = load_deployed(str(work / 'deploy.py'), str(work / 'deploy.pth'))
    with contextlib.redirect_stdout(None):  # pycocotools talks
        dataset = DATASETS.build(config.test_dataloader.dataset)
    batch = preprocessed(stock, dataset, range(min(spec.batch, len(dataset))))

    difference = compare_networks(trained, stock, [batch])
    latency = interleaved_latency(
        [
            lambda: network_outputs(trained, batch),
            lambda: network_outputs(stock, batch),
        ]
    )
    print_table(
        ('', 'trained: DBB', 'merged: stock ResNet'),
        [
            (
                'parameters',
                *(f'{count_parameters(m):,}' for m in (trained, stock)),
            ),
            (spec.title, *(f'{found[k]:g}' for k in ('trained', 'deployed'))),
            (
                f'latency of {len(batch)} images (ms)',
                *(f'{1e3 * seconds:.1f}' for seconds in latency),
            ),
            ('largest output difference', '', f'{difference.largest:.1e}'),
        ],
        'The difference is relative to the largest magnitude of an output, '
        f'on {len(batch)} validation images. Latency: without '
        'post-processing, median, both networks in turn, one thread.',
    )
    draw(task, stock, dataset, work / 'predictions.png')


def preprocessed(model: nn.Module, dataset, indices: Sequence[int]) -> Tensor:
    """The images of a dataset as the network gets them, (N, C, H, W)."""
    data = pseudo_collate([dataset[i] for i in indices])
    return model.data_preprocessor(data, False)['inputs']
