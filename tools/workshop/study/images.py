# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Fashion-MNIST as tensors: splits, subsets, random crops and flips."""

from __future__ import annotations

import functools
import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmdbb.errors import UserError

CLASSES = 10
#: Pixels that a crop may be off, in each direction.
_MARGIN = 2
#: Training images a class that settings are chosen on. No network that is
#: compared trains on them, unless it trains on all images.
HELD_OUT = 500
_SEED = 0
_FILES = ('train-images-idx3', 'train-labels-idx1')
_FILES += ('t10k-images-idx3', 't10k-labels-idx1')


class Images(NamedTuple):
    """A set of images with their classes.

    Attributes:
        images: Shape (N, 1, 28, 28); bytes as in the files, or normalised.
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
    """Images to train on, and images to count errors on.

    Attributes:
        train: 60,000 images, or some of them.
        test: 10,000 images; or the images held out for choosing settings.
    """

    train: Images
    test: Images


def split_for(
    data: FashionMNIST, size: int, seed: int, searching: bool
) -> FashionMNIST:
    """Choose the images of one training.

    Args:
        data: The whole data set.
        size: Training images a class. Up to 5,500 come from the images that
            are not held out; with more, all are trained on, but not while
            settings are searched.
        seed: Of the choice among them.
        searching: Whether the held-out images stand in for the test images,
            so that nothing can be tuned on those.

    Returns:
        FashionMNIST: Images normalised to mean 0 and deviation 1, the same
        for every network and block.

    Raises:
        UserError: If a class has fewer images.
    """
    labels = data.train.labels
    fixed = np.random.default_rng(_SEED)
    draw = np.random.default_rng(seed)
    chosen, held_out = [], []
    for label in range(CLASSES):
        places = fixed.permutation(torch.nonzero(labels == label)[:, 0])
        held_out.append(places[:HELD_OUT])
        pool = places[HELD_OUT:]
        if size > len(pool):
            if size > len(places):
                raise UserError(
                    f'size must be at most {len(places)}, the training '
                    f'images of class {label}; got {size}'
                )
            pool = pool if searching else places
        count = min(size, len(pool))
        chosen.append(np.sort(draw.choice(pool, count, replace=False)))
    places = torch.from_numpy(np.concatenate(chosen))
    test = data.test
    if searching:
        test = data.train.take(torch.from_numpy(np.concatenate(held_out)))
    scale = _mean_and_std(data.train.images)
    return FashionMNIST(
        _normalised(data.train.take(places), *scale),
        _normalised(test, *scale),
    )


def read_fashion_mnist(data_root: str) -> FashionMNIST:
    """Read the data set, and download it if it is not there.

    Args:
        data_root: The folder that has or gets the four files in the data
            set's own form, packed by gzip or not.

    Returns:
        FashionMNIST: Images as bytes.

    Raises:
        UserError: If some of the files are there, but not all.
    """
    folder = Path(data_root)
    there = [_path(folder, name) is not None for name in _FILES]
    if not any(there):
        _download(data_root)
    elif not all(there):
        missing = [n for n, found in zip(_FILES, there) if not found]
        raise UserError(f'{data_root} lacks {missing[0]}-ubyte[.gz]')
    images, labels, test_images, test_labels = (
        torch.from_numpy(_read(_path(folder, name))) for name in _FILES
    )
    # Files from elsewhere hold the same images in another order; the splits
    # must not depend on it.
    digests = [hashlib.sha1(image.numpy()).digest() for image in images]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    images, labels = images[order], labels[order]
    return FashionMNIST(
        Images(images[:, None], labels.long()),
        Images(test_images[:, None], test_labels.long()),
    )


def _normalised(part: Images, mean: float, std: float) -> Images:
    return Images((part.images.float() / 255 - mean) / std, part.labels)


@functools.lru_cache(1)
def _mean_and_std(images: Tensor) -> Tuple[float, float]:
    """Of all pixels, which count from 0 to 1."""
    count = torch.zeros(256, dtype=torch.float64)
    for part in images.split(1000):  # all at once would need much memory
        count += part.flatten().bincount(minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (count @ values / count.sum()).item()
    variance = count @ (values - mean) ** 2 / count.sum()
    return mean, variance.sqrt().item()


def _path(folder: Path, name: str):
    for ending in ('-ubyte', '-ubyte.gz'):
        if (folder / f'{name}{ending}').is_file():
            return folder / f'{name}{ending}'
    return None


def _download(data_root: str) -> None:
    from mmpretrain.datasets import FashionMNIST as Dataset

    Dataset(
        data_root=data_root, split='train', lazy_init=True
    ).load_data_list()


def _read(path: Path) -> np.ndarray:
    """Read one file of the data set's form, IDX of unsigned bytes."""
    content = path.read_bytes()
    if path.suffix == '.gz':
        content = gzip.decompress(content)
    dimensions = content[3] if content[:3] == b'\0\0\x08' else 0
    shape = np.frombuffer(content, '>i4', dimensions, 4).tolist()
    values = np.frombuffer(content, np.uint8, -1, 4 + 4 * dimensions)
    if not dimensions or values.size != np.prod(shape):
        raise UserError(f'{path} is no whole file of images or labels')
    return values.reshape(shape).copy()


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
