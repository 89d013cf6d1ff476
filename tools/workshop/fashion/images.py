# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Fashion-MNIST as tensors, and random crops and flips of a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

#: Pixels that a crop may be off, in each direction.
_MARGIN = 2
#: Share of the training images that the learning rate is chosen on: one in
#: this many.
_HELD_OUT = 12
_SEED = 0


class Images(NamedTuple):
    """A set of images with their classes.

    Attributes:
        images: Shape (N, 1, 28, 28), normalised to mean 0 and deviation 1.
        labels: Shape (N,), numbers of the classes.
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Images:
        """Copy to a device."""
        return Images(self.images.to(device), self.labels.to(device))

    def take(self, places: Tensor) -> Images:
        """Choose images by their places."""
        return Images(self.images[places], self.labels[places])


class FashionMNIST(NamedTuple):
    """The data set.

    Attributes:
        train: 60,000 images.
        test: 10,000 images.
    """

    train: Images
    test: Images

    def for_search(self) -> FashionMNIST:
        """Split the training images: 55,000 to train on, 5,000 to choose by.

        The test images are left out, so nothing can be tuned on them.
        """
        count = len(self.train.labels)
        generator = torch.Generator().manual_seed(_SEED)
        places = torch.randperm(count, generator=generator)
        return FashionMNIST(
            self.train.take(places[count // _HELD_OUT :]),
            self.train.take(places[: count // _HELD_OUT]),
        )


def read_fashion_mnist(data_root: str) -> FashionMNIST:
    """Read the data set, and download it if it is not there.

    Args:
        data_root: The folder that has or gets the four files.
    """
    from mmpretrain.datasets import FashionMNIST as Dataset

    parts = []
    for split in ('train', 'test'):
        items = Dataset(
            data_root=data_root,
            split=split,
            test_mode=split == 'test',
            lazy_init=True,
        ).load_data_list()
        images = np.stack([item['img'].reshape(28, 28) for item in items])
        labels = torch.tensor([int(item['gt_label']) for item in items])
        parts.append(Images(torch.from_numpy(images)[:, None] / 255, labels))
    mean, std = parts[0].images.mean(), parts[0].images.std()
    return FashionMNIST(
        *(Images((p.images - mean) / std, p.labels) for p in parts)
    )


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to two pixels, and mirror half of them.

    Args:
        images: Shape (N, 1, H, W).
        generator: Where random numbers are drawn from, on the same device.
    """
    count, _, height, width = images.shape
    device = images.device

    def draw(largest: int) -> Tensor:
        return torch.randint(
            largest, (count, 1), generator=generator, device=device
        )

    columns = torch.arange(width, device=device).expand(count, width)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    rows = torch.arange(height, device=device) + draw(2 * _MARGIN + 1)
    columns = columns + draw(2 * _MARGIN + 1)
    padded = F.pad(images, [_MARGIN] * 4, value=images.min().item())[:, 0]
    place = torch.arange(count, device=device)[:, None, None]
    return padded[place, rows[:, :, None], columns[:, None, :]][:, None]
