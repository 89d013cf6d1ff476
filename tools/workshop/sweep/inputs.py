# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Inputs with labels for one step of training, of the packages' own kinds."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any, Callable, Dict, Tuple

import torch
from torch import Tensor, nn

from mmdbb.deploy import Proof

Size = Tuple[int, int]


def losses_of(model: nn.Module, size: Size, package: str) -> Tensor:
    """The loss of a network for two random images with labels.

    Args:
        model: A classifier, segmentor or detector in training mode.
        size: Height and width of the images in pixels.
        package: Import name of the package whose config it is.

    Returns:
        Tensor: The sum of all losses.

    Raises:
        Exception: Whatever the network raises for these inputs.
    """
    data = _INPUTS[package](model, size)
    _pad_no_further(model.data_preprocessor, size)
    data = model.data_preprocessor(data, True)
    total, _ = model.parse_losses(model(**data, mode='loss'))
    return total


def images_for(model: nn.Module, size: Size) -> Tensor:
    """Random images, preprocessed if the model's preprocessor takes images.

    Those of mmpose, mmaction and mmdet3d want more than images.

    Args:
        model: The network.
        size: Height and width of the images in pixels.
    """
    with contextlib.suppress(Exception):
        images = Proof(image_size=size).batches(model)[0]
        if images.dim() in (4, 5):  # 5 of videos
            return images
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *size, generator=generator)


def _pad_no_further(preprocessor: nn.Module, size: Size) -> None:
    """Keep images as small as they are; configs pad them to 512 and more."""
    if getattr(preprocessor, 'size', None) is not None:
        preprocessor.size = size
    if hasattr(preprocessor, 'batch_augments'):
        preprocessor.batch_augments = None


def _images(size: Size) -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, *size), generator=generator).byte()
        for _ in range(2)
    ]


def _classes(model: nn.Module, size: Size) -> Dict[str, Any]:
    sample = importlib.import_module('mmpretrain.structures').DataSample
    samples = [sample().set_gt_label(i) for i in range(2)]
    return dict(inputs=_images(size), data_samples=samples)


def _maps(model: nn.Module, size: Size) -> Dict[str, Any]:
    package = importlib.import_module('mmseg.structures')
    pixels = importlib.import_module('mmengine.structures').PixelData
    samples = []
    for _ in range(2):
        labels = torch.zeros(1, *size, dtype=torch.long)
        labels[:, : size[0] // 2] = 1
        info = dict(img_shape=size, ori_shape=size, pad_shape=size, flip=False)
        sample = package.SegDataSample(metainfo=info)
        sample.gt_sem_seg = pixels(data=labels)
        samples.append(sample)
    return dict(inputs=_images(size), data_samples=samples)


def _boxes(model: nn.Module, size: Size) -> Dict[str, Any]:
    testing = importlib.import_module('mmdet.testing')
    mask = getattr(model, 'with_mask', False)
    heads = (getattr(model, n, None) for n in ('mask_head', 'bbox_head'))
    mask = mask or any('Mask' in type(head).__name__ for head in heads)
    shapes = [(3, *size)] * 2
    return testing.demo_mm_inputs(2, shapes, num_classes=2, with_mask=mask)


def _rotated_boxes(model: nn.Module, size: Size) -> Dict[str, Any]:
    testing = importlib.import_module('mmrotate.testing')
    return testing.demo_mm_inputs(2, (3, *size), [3, 3], 2, use_box_type=True)


def _boxes_in_one(model: nn.Module, size: Size) -> Dict[str, Any]:
    """mmyolo's preprocessors take all images and boxes in one tensor each."""
    data = _boxes(model, size)
    boxes = []
    for number, sample in enumerate(data['data_samples']):
        found = sample.gt_instances
        image = torch.full_like(found.labels, number)
        labels = torch.stack([image, found.labels], 1).float()
        boxes.append(torch.cat([labels, found.bboxes], 1))
    return dict(
        inputs=torch.stack(data['inputs']),
        data_samples=dict(bboxes_labels=torch.cat(boxes)),
    )


_INPUTS: Dict[str, Callable[[nn.Module, Size], Dict[str, Any]]] = {
    'mmpretrain': _classes,
    'mmseg': _maps,
    'mmdet': _boxes,
    'mmrotate': _rotated_boxes,
    'mmyolo': _boxes_in_one,
}
