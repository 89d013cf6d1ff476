# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Take the images for calibration from the config's own dataloader."""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner import BaseLoop, Runner, set_random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdbb.errors import UserError, interruption
from mmdbb.mm.engine.random_numbers import random_numbers_kept
from mmdbb.mm.export.modules import is_detector
from mmdbb.mm.host_internals import shut_down

SPLITS = ('train', 'val', 'test')


class Calibration(NamedTuple):
    """A choice of images from the config's data sets, for calibration.

    Attributes:
        count: Number of images; all of them if the data set has fewer.
        split: The split whose dataloader gives them: one of :data:`SPLITS`.
        seed: Random seed for shuffling and augmentation.
    """

    count: int = 128
    split: str = 'train'
    seed: int = 0

    def images(
        self,
        cfg: Config,
        model: nn.Module,
        size: Optional[Tuple[int, int]] = None,
    ) -> Tensor:
        """Load the images, and normalise them as the network's input.

        Args:
            cfg: Config with the dataloader.
            model: The network; its ``data_preprocessor`` normalises the
                images as in a test.
            size: Height and width in pixels. Smaller images are padded to it
                at the right and below. By default the size of the first
                image.

        Returns:
            Tensor: The images, shape (N, C, H, W).

        Raises:
            UserError: If there are no images, one cannot be read or is
                larger than ``size``, or no range can be learned from them
                because all are constant.
        """
        return calibration_images(
            cfg, model, self.count, self.split, size, self.seed
        )


def default_size(
    cfg: Config, model: nn.Module, seed: int = 0
) -> Tuple[int, int]:
    """Height and width in pixels of the images that a file should take.

    Classifiers and segmentors take images of one size: the first's. The
    images of detectors differ, and smaller ones are padded: theirs is the
    smallest size that holds all of the test set, rounded up as the
    ``data_preprocessor`` does.

    Args:
        cfg: Config with the test dataloader.
        model: The network.
        seed: Random seed for shuffling and augmentation.

    Raises:
        UserError: If there are no images, or one cannot be read.
    """
    images = calibration_images(cfg, model, 1, 'test', seed=seed)
    if not is_detector(model):
        return tuple(images.shape[-2:])
    dataset = _dataset(cfg, 'test', seed)
    largest = [1, 1]
    with random_numbers_kept():
        for sample in _explained(_one_of_each_size(dataset), 'test'):
            size = sample['inputs'].shape[-2:]
            largest = [max(pair) for pair in zip(largest, size)]
    step = getattr(model.data_preprocessor, 'pad_size_divisor', 1) or 1
    return tuple(-(-side // step) * step for side in largest)


def _one_of_each_size(dataset: Any) -> Iterator[Any]:
    """Samples of a data set, one for each size of its images on the disk."""
    from PIL import Image

    seen = set()
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        size = info.get('height'), info.get('width')
        if None in size:
            with Image.open(info['img_path']) as image:
                size = image.size
        if size not in seen:
            seen.add(size)
            yield dataset[index]


def calibration_images(
    cfg: Config,
    model: nn.Module,
    count: int,
    split: str = 'train',
    size: Optional[Tuple[int, int]] = None,
    seed: int = 0,
) -> Tensor:
    """Load the first images of a dataloader, normalised as network input.

    Args:
        cfg: Config with the dataloader.
        model: The network; its ``data_preprocessor`` normalises the images as
            in a test.
        count: Number of images; all of them if the data set has fewer.
        split: The split whose dataloader gives them: one of :data:`SPLITS`.
        size: Height and width in pixels. Smaller images are padded to it at
            the right and below, batches of larger ones are passed over. By
            default the size of the first image.
        seed: Random seed for shuffling and augmentation.

    Returns:
        Tensor: The images, shape (N, C, H, W).

    Raises:
        UserError: If there are no images, one cannot be read, all are larger
            than ``size``, or no range can be learned from them because all
            are constant.
    """
    if count < 1:
        raise UserError(
            f'calibration needs at least one image; got --calib {count}'
        )
    if split not in SPLITS:
        raise UserError(
            f'no such dataloader: {split!r}; allowed: {", ".join(SPLITS)}'
        )
    batches, found, larger = [], 0, None
    with random_numbers_kept():
        for inputs in _inputs(cfg, model, split, seed):
            if size is None:
                size = tuple(inputs.shape[-2:])
            if inputs.shape[-2] > size[0] or inputs.shape[-1] > size[1]:
                larger = inputs
                continue
            batches.append(pad_to(inputs, size)[: count - found])
            found += len(batches[-1])
            if found >= count:
                break
    if not found:
        if larger is not None:
            pad_to(larger, size)  # says so
        raise UserError(
            f'there are no calibration images: {split}_dataloader gives none'
        )
    images = torch.cat(batches)
    check_calibration(images)
    return images


def check_calibration(images: Tensor) -> None:
    """Raise if the range of a network's values cannot be learned from images.

    Args:
        images: The images, shape (N, C, H, W).

    Raises:
        UserError: If there are none, one is not finite, or all are constant.
    """
    if not len(images):
        raise UserError('there are no calibration images')
    if not images.isfinite().all():
        raise UserError('a calibration image has values that are not finite')
    if not (images.amax((2, 3)) - images.amin((2, 3))).any():
        raise UserError(
            f'all {len(images)} calibration images are constant: they say '
            'nothing about the ranges inside the network'
        )


def pad_to(images: Tensor, size: Tuple[int, int]) -> Tensor:
    """Pad images with zeros at the right and below.

    Args:
        images: The images, shape (N, C, H, W).
        size: Height and width to pad to, in pixels.

    Raises:
        UserError: If the images are larger than that.
    """
    height, width = images.shape[-2:]
    if height > size[0] or width > size[1]:
        raise UserError(
            f'an image of {height} x {width} pixels does not fit into the '
            f'network of {size[0]} x {size[1]}; choose another --image-size, '
            'or none for the smallest that holds all test images'
        )
    return F.pad(images, (0, size[1] - width, 0, size[0] - height))


def _inputs(cfg: Config, model: nn.Module, split: str, seed: int):
    loader = _loader(cfg, split, seed)
    for data in _explained(iter(loader), split):
        inputs = model.data_preprocessor(data, False)['inputs']
        yield inputs.detach().cpu().float()


def _dataset(cfg: Config, split: str, seed: int) -> Any:
    return _loader(cfg, split, seed).dataset


def _loader(cfg: Config, split: str, seed: int) -> DataLoader:
    loader = cfg.get(f'{split}_dataloader')
    if loader is None:
        raise UserError(f'the config has no {split}_dataloader')
    loader = copy.deepcopy(loader)
    # Load in this process, so that the seed alone determines the images.
    for key in ('persistent_workers', 'prefetch_factor', 'pin_memory'):
        loader.pop(key, None)
    loader.num_workers = 0
    loader.drop_last = False
    set_random_seed(seed)
    try:
        return Runner.build_dataloader(loader, seed=seed)
    except ValueError as error:  # a sampler without samples
        raise UserError(
            f'{split}_dataloader cannot be built: {error}'
        ) from error


@contextlib.contextmanager
def explained_loading(loop: BaseLoop, split: str) -> Iterator[None]:
    """Within the context, an image that cannot be read is a user's mistake.

    Args:
        loop: The loop whose images are loaded. Its workers have ended on
            exit.
        split: The split that it runs through, for the message.
    """
    loader = loop.dataloader
    loop.dataloader = _ExplainedLoader(loader, split)
    try:
        yield
    finally:
        loop.dataloader.close()
        loop.dataloader = loader


class _ExplainedLoader:
    """A dataloader whose errors are those of the user."""

    def __init__(self, loader: Any, split: str) -> None:
        self._loader, self._split = loader, split
        self._iterator = None

    def __iter__(self) -> Iterator[Any]:
        self._iterator = iter(self._loader)
        return _explained(self._iterator, self._split)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def close(self) -> None:
        """End the workers, unless they persist for the next time."""
        if not getattr(self._loader, 'persistent_workers', False):
            shut_down(self._iterator)


def _explained(batches: Iterator[Any], split: str) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:  # pipelines raise errors of any type
            if interruption(error) is not None:
                raise
            # A worker's error holds its traceback; the reason comes last.
            reason = (str(error).strip() or type(error).__name__).splitlines()
            raise UserError(
                f'{split}_dataloader cannot load an image: {reason[-1]} '
                '(MMDBB_TRACEBACK=1 shows where)'
            ) from error
        yield batch
