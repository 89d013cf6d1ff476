# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train one network in plain torch, with everything on one device."""

from __future__ import annotations

import time
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdbb.modules import in_eval_mode
from mmdbb.reparam import find_blocks, reparameterize
from workshop.benchmark.measure import captured, kept_megabytes
from workshop.study.images import Images, augmented

PRECISIONS = dict(
    float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16
)
_TEST_BATCH = 500


class Recipe(NamedTuple):
    """How a network is trained: SGD with Nesterov's momentum of 0.9.

    Attributes:
        lr: Largest learning rate, after a warm-up of a tenth of the steps;
            it then falls to 0 by a cosine.
        epochs: Passes over the training images, perhaps a part of one.
        batch: Images in a step.
        weight_decay: Of all parameters.
    """

    lr: float
    epochs: float
    batch: int
    weight_decay: float = 5e-4


class Machine(NamedTuple):
    """Where to train.

    Attributes:
        device: The device.
        precision: One of :data:`PRECISIONS`, by autocast.
        graphs: Whether forward and backward pass are replayed as a CUDA
            graph, so that times are the GPU's, not those of launching.
        channels_last: Whether kernels and maps lie in that memory format.
    """

    device: torch.device = torch.device('cpu')
    precision: str = 'float32'
    graphs: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        """What a row says of it."""
        name = 'CPU, one thread'
        if self.device.type == 'cuda':
            name = torch.cuda.get_device_name(self.device)
        name += f', {self.precision}'
        if self.graphs:
            name += ', CUDA graphs'
        return name + CHANNELS_LAST if self.channels_last else name

    def take(self, network: nn.Module) -> nn.Module:
        """Put a network where and as the machine computes."""
        network = network.to(self.device)
        if self.channels_last:
            network = network.to(memory_format=torch.channels_last)
        return network


#: How the names of machines with that memory format end.
CHANNELS_LAST = ', channels_last'
#: One thread of a CPU.
CPU = Machine()


def train(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    seed: int,
    machine: Machine = CPU,
) -> float:
    """Train a network in place.

    Args:
        network: On the machine's device.
        images: What to train on, on the device.
        recipe: How to train.
        seed: Of the order and the crops.
        machine: The device and precision.

    Returns:
        float: Seconds of all steps. On a CPU they are those that this process
        computed, which other work on the machine disturbs little.
    """
    device = machine.device
    count = len(images.labels)
    batch = min(recipe.batch, count)
    steps = count // batch
    optimizer = torch.optim.SGD(
        network.parameters(),
        recipe.lr,
        momentum=0.9,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    total = max(1, round(steps * recipe.epochs))
    warm_up = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, max(1, total - warm_up)
            ),
        ],
        [warm_up],
    )
    scaler = torch.amp.GradScaler(
        device.type, enabled=machine.precision == 'float16'
    )
    generator = torch.Generator(device).manual_seed(seed)
    network.train()
    forward_and_backward = _step_of(network, images, batch, scaler, machine)
    begin = _now(device)
    for done in range(0, total, steps):
        order = torch.randperm(count, generator=generator, device=device)
        for places in order.split(batch)[: min(steps, total - done)]:
            inputs, labels = images.take(places)
            forward_and_backward(augmented(inputs, generator), labels)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
    return _now(device) - begin


def _step_of(
    network: nn.Module,
    images: Images,
    batch: int,
    scaler: torch.amp.GradScaler,
    machine: Machine,
) -> Callable[[Tensor, Tensor], None]:
    def forward_and_backward(inputs: Tensor, labels: Tensor) -> None:
        if machine.channels_last:
            # Of grey images torch cannot tell the format by their kernels.
            inputs = inputs.to(memory_format=torch.channels_last)
        with torch.autocast(
            machine.device.type,
            PRECISIONS[machine.precision],
            enabled=machine.precision != 'float32',
            cache_enabled=not machine.graphs,
        ):
            loss = F.cross_entropy(network(inputs), labels)
        for parameter in network.parameters():
            parameter.grad = None
        scaler.scale(loss).backward()

    if not machine.graphs:
        return forward_and_backward
    return captured(forward_and_backward, *(t[:batch] for t in images))


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def megabytes(network: nn.Module, images: Images, batch: int) -> float:
    """Memory of a training step, counted: what autograd keeps, and for each
    parameter its value, gradient and momentum.

    Args:
        network: The network.
        images: At least a batch of images.
        batch: Images in a step.
    """
    network.train()
    own = sum(p.nbytes for p in network.parameters()) / 1e6

    def forward() -> object:
        inputs, labels = (t[:batch] for t in images)
        return F.cross_entropy(network(inputs), labels)

    with torch.random.fork_rng(devices=[]):
        return kept_megabytes(forward, network) + 3 * own


def merged(network: nn.Module) -> nn.Module:
    """The plain network that a trained one equals; itself if it is plain."""
    return reparameterize(network) if find_blocks(network) else network


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
