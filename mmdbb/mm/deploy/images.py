# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The images that two networks are compared on."""

from __future__ import annotations

import math
from typing import List, Sequence, Tuple

import mmcv
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import check_regular

#: The most pixels of an image to compare on: a small file can claim to be a
#: large one.
MOST_PIXELS = 1 << 26


def input_batches(
    model: nn.Module,
    images: Sequence[str],
    size: Tuple[int, int],
    seed: int,
) -> List[Tensor]:
    """Random and given images, as the model's preprocessor leaves them.

    Args:
        model: The model.
        images: Paths of images.
        size: Height and width in pixels that they are brought to.
        seed: For the random ones.

    Raises:
        UserError: If an image cannot be read.
    """
    generator = np.random.default_rng(seed)
    batches = [
        [
            generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            for _ in range(2)
        ]
    ]
    for path in images:
        try:
            check_regular(path, 'image')
            with Image.open(path) as header:
                pixels = math.prod(header.size)
            if pixels > MOST_PIXELS:
                raise UserError(
                    f'it has {pixels:,} pixels; at most {MOST_PIXELS:,} are '
                    'read'
                )
            image = mmcv.imread(path)
        except UnidentifiedImageError as error:
            raise UserError(f'not an image: {path}') from error
        except Exception as error:
            # Decoders fail in many ways, Pillow on bombs by one of its own.
            raise UserError(f'cannot read image {path}: {error}') from error
        if image is None:
            raise UserError(f'not an image: {path}')
        batches.append([mmcv.imresize(image, size[::-1])])
    return [_preprocessed(model, batch) for batch in batches]


def _preprocessed(model: nn.Module, images: List[np.ndarray]) -> Tensor:
    tensors = [
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        for image in images
    ]
    preprocessor = getattr(model, 'data_preprocessor', None)
    if preprocessor is None:
        return torch.stack(tensors).float() / 255
    return preprocessor(dict(inputs=tensors))['inputs']
