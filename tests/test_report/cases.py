"""Networks to report on."""

import torch
from helpers import randomize
from torch import nn

from mmdbb import ACB, DBB, OREPAConv, RepVGGConv


def small_network(seed=0):
    """A block of each family, with a norm behind it or without."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        DBB(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        OREPAConv(8, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        RepVGGConv(8, 8, 3, padding=1),
        nn.ReLU(),
        ACB(8, 4, (3, 5), groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    return randomize(network, seed).eval()


def some_images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 14, 18, generator=generator)
