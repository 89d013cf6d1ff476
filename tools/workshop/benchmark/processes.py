# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What blocks cost with SyncBN: two processes that share their batches.

The norms inside blocks are SyncBN, the others are not: torch's own takes no
images on a CPU. So *plain* is not measured here, and ratios are to *literal*.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import List

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from mmdbb.reparam import find_blocks
from workshop.benchmark.measure import interleaved, kept_megabytes
from workshop.benchmark.papers import papers_way
from workshop.benchmark.phases import NETWORKS, Row


def sync_rows(
    network: str, block: str, images: Tensor, repeats: int
) -> List[Row]:
    """Measure a training step with SyncBN on two processes of a CPU.

    Args:
        network: One of :data:`NETWORKS`.
        block: Name of a block.
        images: Each process's batch, of shape (N, 3, H, W).
        repeats: How many interleaved runs.

    Returns:
        list: Rows ``literal`` and ``default`` of the phase ``sync``.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = (network, block, images.cpu(), repeats, folder)
        mp.spawn(_process, args, nprocs=2)
        return torch.load(Path(folder) / 'rows.pth', weights_only=False)


def _process(
    rank: int,
    network: str,
    block: str,
    images: Tensor,
    repeats: int,
    folder: str,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/meeting',
        rank=rank,
        world_size=2,
    )
    torch.manual_seed(0)
    model = NETWORKS[network][1](dict(type=block))
    model.train()
    for layer in find_blocks(model).values():
        layer.branches = nn.SyncBatchNorm.convert_sync_batchnorm(
            layer.branches
        )

    def forward() -> Tensor:
        return model(images)[0]

    def literal() -> Tensor:
        with papers_way(model):
            return forward()

    def step(run) -> None:
        run().mean().backward()
        model.zero_grad()

    forwards = dict(literal=literal, default=forward)
    times = interleaved(
        {n: lambda f=f: step(f) for n, f in forwards.items()}, repeats
    )
    rows = [
        Row('sync', n, times[n], kept_megabytes(f, model), None)
        for n, f in forwards.items()
    ]
    if rank == 0:
        torch.save(rows, Path(folder) / 'rows.pth')
    dist.destroy_process_group()
