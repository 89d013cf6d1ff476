# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The images that two networks are compared on."""

from __future__ import annotations

import math
from typing import List, Tuple, Union

import mmcv
import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from mmdbb.dimensions import per_channel
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import check_regular
from mmdbb.mm.data_flow import channels_of, image_shape

#: Images with more pixels are refused, because a small file can claim to be a
#: large image and fill the memory.
MOST_PIXELS = 1 << 26


def random_batch(model: nn.Module, size: Tuple[int, int], seed: int) -> Tensor:
    """Draw two random images, and preprocess them for a model.

    Args:
        model: The model whose ``data_preprocessor`` to use. Without one,
            pixels are divided by 255.
        size: Height and width of the images in pixels.
        seed: Seed of the random numbers.

    Returns:
        Tensor: Normalised images (2, C, H, W). C is 3, but for a network
        without a mean of 3 channels whose first convolution takes another
        number. For a network of videos (2, C, T, H, W), for one of lines
        (2, C, W).
    """
    generator = np.random.default_rng(seed)
    channels = _channels(model)
    shape = image_shape(model, channels, size)
    if len(shape) != 3:
        pixels = generator.integers(0, 256, (2, *shape), dtype=np.uint8)
        return _normalised(model, torch.from_numpy(pixels).float())
    images = [
        generator.integers(0, 256, (*size, channels), dtype=np.uint8)
        for _ in range(2)
    ]
    return _preprocessed(model, images)


def given_batch(
    model: nn.Module, image: Union[str, Tensor], size: Tuple[int, int]
) -> Tensor:
    """Read an image, resize it, and preprocess it for a model.

    Args:
        model: The model whose ``data_preprocessor`` to use. Without one,
            pixels are divided by 255.
        image: Path of the image; or a batch that is preprocessed already,
            which is returned as it is.
        size: Height and width in pixels to which an image from a file is
            resized.

    Returns:
        Tensor: Normalised images (N, C, H, W).

    Raises:
        UserError: If the image cannot be read.
    """
    if isinstance(image, Tensor):
        return image
    pixels = mmcv.imresize(_read(image), size[::-1])
    sizes = image_shape(model, pixels.shape[2], size)[1:]
    if len(sizes) == 1:
        raise UserError(
            f'{image} is a picture, but the network takes images of one '
            'dimension; leave the image out'
        )
    batch = _preprocessed(model, [pixels])
    if len(sizes) == 3:  # a video that stands still
        batch = batch[:, :, None].expand(-1, -1, sizes[0], -1, -1)
    return batch


def _read(path: str) -> np.ndarray:
    try:
        check_regular(path, 'image')
        with Image.open(path) as header:
            pixels = math.prod(header.size)
        if pixels > MOST_PIXELS:
            raise UserError(
                f'it has {pixels:,} pixels; at most {MOST_PIXELS:,} are read'
            )
        image = mmcv.imread(path)
    except UnidentifiedImageError as error:
        raise UserError(f'not an image: {path}') from error
    except Exception as error:
        # Decoders raise all kinds of errors; for an image that claims to be
        # huge Pillow has one of its own.
        raise UserError(f'cannot read image {path}: {error}') from error
    if image is None:
        raise UserError(f'not an image: {path}')
    return image


def _preprocessed(model: nn.Module, images: List[np.ndarray]) -> Tensor:
    tensors = [
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        for image in images
    ]
    preprocessor = getattr(model, 'data_preprocessor', None)
    if preprocessor is None:
        return torch.stack(tensors).float() / 255
    try:
        found = preprocessor(dict(inputs=tensors))['inputs']
        # Preprocessors for several views of an image take each for a view.
        return found if isinstance(found, Tensor) else torch.stack(found)
    except Exception:
        # Some preprocessors of videos, of points and of pairs of images need
        # more than images.
        return _normalised(model, torch.stack(tensors).float())


def _normalised(model: nn.Module, images: Tensor) -> Tensor:
    """Images on the scale of a preprocessor that does not take images."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    mean, std = (getattr(preprocessor, n, None) for n in ('mean', 'std'))
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return images / 255
    dims = images.dim() - 2
    return (images - per_channel(mean, dims)) / per_channel(std, dims)


def _channels(model: nn.Module) -> int:
    """Number of channels of a model's images, as files hold them."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    if isinstance(mean, Tensor) and mean.numel() > 1:
        return mean.numel()
    return channels_of(model)


def data_samples(images: Tensor) -> List[BaseDataElement]:
    """Make the data samples that networks read beside a batch of images.

    They say that the images are whole, neither padded nor scaled, and that
    one object fills the middle of each.

    Args:
        images: Images (N, C, H, W).
    """
    height, width = images.shape[-2:]
    size = (height, width)
    whole = dict(
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1.0, 1.0),
        flip=False,
    )
    box = [width / 4, height / 4, 3 * width / 4, 3 * height / 4]
    samples = []
    for _ in images:
        instances = InstanceData(
            bboxes=images.new_tensor([box]),
            labels=torch.zeros(1, dtype=torch.int64, device=images.device),
            scores=images.new_ones(1),
        )
        sample = BaseDataElement(metainfo=whole)
        sample.gt_instances = sample.proposals = instances
        samples.append(sample)
    return samples
