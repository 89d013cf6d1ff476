# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train one network in plain torch, with everything on one device."""

from __future__ import annotations

import time
from typing import Dict, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmdbb
from mmdbb.mm.backbones import ResNetDBB
from mmdbb.modules import in_eval_mode
from workshop.benchmark.measure import captured
from workshop.fashion.images import FashionMNIST, Images, augmented

#: Name in tables -> the block of one and the same network.
BLOCKS: Dict[str, dict] = {
    'plain': dict(type='Conv2d'),
    'DBB': dict(type='DBB'),
    'OREPA': dict(type='OREPA'),
}
PRECISIONS = dict(
    float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16
)
_TEST_BATCH = 1000


class Recipe(NamedTuple):
    """What every training gets.

    Attributes:
        lr: Largest learning rate of SGD, after a warm-up of one epoch; it
            then falls to 0 by a cosine.
        epochs: Passes over the training images.
        batch: Images in a step.
        precision: One of :data:`PRECISIONS`, by autocast.
        width: Channels of the first stage, 64 in ResNet-18.
        captured: Whether forward and backward pass are replayed as a CUDA
            graph, so that times are the GPU's, not those of launching.
    """

    lr: float
    epochs: int = 15
    batch: int = 512
    precision: str = 'float16'
    width: int = 64
    captured: bool = False


class Result(NamedTuple):
    """One training.

    Attributes:
        block: One of :data:`BLOCKS`.
        seed: Of the weights, the order and the crops.
        recipe: How it was trained.
        searched: Whether it was trained to choose a learning rate: on 55,000
            images, with the accuracy on the other 5,000.
        top1: Accuracy of the trained network, per cent.
        merged_top1: Accuracy after merging, per cent.
        seconds: Time of all training steps.
        peak_mb: Largest sum of allocations on the GPU while training, in
            megabytes, the images included; 0 on a CPU.
        device: Name of the device.
    """

    block: str
    seed: int
    recipe: Recipe
    searched: bool
    top1: float
    merged_top1: float
    seconds: float
    peak_mb: float
    device: str


class Classifier(nn.Module):
    """ResNet-18 for small images: a 3x3 stem of stride 1, and no pooling.

    All networks are of this class; merged, they are the same network.

    Args:
        block: Config of the block.
        width: Channels of the first stage.
    """

    def __init__(self, block: dict, width: int) -> None:
        super().__init__()
        self.backbone = ResNetDBB(
            18,
            block=block,
            stem_channels=width,
            base_channels=width,
            init_cfg=dict(type='TorchDefault'),
        )
        self.backbone.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.backbone.bn1 = nn.BatchNorm2d(width)
        self.backbone.maxpool = nn.Identity()
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x)[-1].mean((2, 3)))


def start(block: str, seed: int, width: int) -> Classifier:
    """Make a network whose layers outside blocks depend on the seed alone.

    Args:
        block: One of :data:`BLOCKS`.
        seed: Of the weights.
        width: Channels of the first stage.
    """
    torch.manual_seed(seed)
    network = Classifier(dict(BLOCKS[block]), width)
    network.backbone.init_weights()
    # Drawn anew, because building blocks drew random numbers before.
    torch.manual_seed(seed)
    for layer in (network.backbone.conv1, network.fc):
        layer.reset_parameters()
    return network


def train(
    block: str,
    seed: int,
    recipe: Recipe,
    data: FashionMNIST,
    device: torch.device,
    searched: bool = False,
) -> Result:
    """Train one network, and merge it.

    Args:
        block: One of :data:`BLOCKS`.
        seed: Of the weights, the order and the crops.
        recipe: How to train.
        data: Images to train and to test on.
        device: Where to train.
        searched: Passed on to the result.
    """
    network = start(block, seed, recipe.width).to(device)
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(),
        recipe.lr,
        momentum=0.9,
        weight_decay=5e-4,
        nesterov=True,
    )
    steps = len(data.train.labels) // recipe.batch
    total = steps * recipe.epochs
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, steps),
            torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, max(1, total - steps)
            ),
        ],
        [steps],
    )
    half = recipe.precision == 'float16'
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    generator = torch.Generator(device).manual_seed(seed)
    on_gpu = device.type == 'cuda'
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    network.train()

    def forward_and_backward(images: Tensor, labels: Tensor) -> None:
        with torch.autocast(
            device.type,
            PRECISIONS[recipe.precision],
            enabled=recipe.precision != 'float32',
            cache_enabled=not recipe.captured,
        ):
            loss = F.cross_entropy(network(images), labels)
        for parameter in network.parameters():
            parameter.grad = None
        scaler.scale(loss).backward()

    if recipe.captured:
        first = data.train.take(torch.arange(recipe.batch, device=device))
        forward_and_backward = captured(forward_and_backward, *first)
    begin = time.perf_counter()
    for _ in range(recipe.epochs):
        order = torch.randperm(
            len(data.train.labels), generator=generator, device=device
        )
        for places in order.split(recipe.batch)[:steps]:
            images, labels = data.train.take(places)
            forward_and_backward(augmented(images, generator), labels)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if on_gpu else 0.0
    merged = network if block == 'plain' else mmdbb.reparameterize(network)
    return Result(
        block=block,
        seed=seed,
        recipe=recipe,
        searched=searched,
        top1=top1(network, data.test),
        merged_top1=top1(merged, data.test),
        seconds=seconds,
        peak_mb=peak,
        device=torch.cuda.get_device_name(device) if on_gpu else 'CPU',
    )


@torch.no_grad()
def top1(network: nn.Module, images: Images) -> float:
    """Accuracy in single precision, per cent.

    Args:
        network: The network; its mode is restored.
        images: Images to classify, on the network's device.
    """
    with in_eval_mode(network):
        right = [
            (network(x).argmax(1) == y).sum()
            for x, y in zip(*(part.split(_TEST_BATCH) for part in images))
        ]
    return 100 * torch.stack(right).sum().item() / len(images.labels)
