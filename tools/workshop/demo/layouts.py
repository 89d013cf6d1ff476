# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The demo's data sets in the layouts of ImageNet, COCO and Cityscapes.

A layout is a function that yields ``(path, content)``: the path of a file
relative to the data set's folder, and a function that returns its bytes, so
that only files which are missing are computed.
"""

import io
import json
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Callable, Dict, Iterator, Tuple

import numpy as np

from workshop.demo.scenes import SPLITS, Scene, Source

Files = Iterator[Tuple[str, Callable[[], bytes]]]

# Of Cityscapes' own table (cityscapesscripts, helpers/labels.py): the label
# ids of its training classes, whose position is the train id.
CITYSCAPES_LABEL_IDS = (
    7,
    8,
    11,
    12,
    13,
    17,
    19,
    20,
    21,
    22,
    23,
    24,
    25,
    26,
    27,
    28,
    31,
    32,
    33,
)
# Digit d is painted as train class d, the photograph as the class after
# them ('sky').
BACKGROUND_TRAIN_ID = 10
CITIES = {'train': 'trainville', 'val': 'valtown'}


@dataclass(frozen=True)
class Layout:
    """A data set of the demo.

    Attributes:
        name: Its folder.
        files: Yields its files, from a source and the images a split.
        images: How many images each split has unless told otherwise.
        most: The most images a split can have, where that is limited.
    """

    name: str
    files: Callable[[Source, Dict[str, int]], Files]
    images: Dict[str, int]
    most: Dict[str, int]


def imagenet_files(source: Source, images: Dict[str, int]) -> Files:
    """MNIST-5k, one folder of JPEGs a digit, as ImageNet."""
    for split in SPLITS:
        lines = []
        for label in range(10):
            for index in range(images[split] // 10):
                name = f'{label}/{split}_{label}_{index:04d}.JPEG'
                lines.append(f'{name} {label}\n')
                yield (
                    f'{split}/{name}',
                    partial(_single_digit, source, split, label, index),
                )
        yield f'meta/{split}.txt', ''.join(lines).encode


def coco_files(source: Source, images: Dict[str, int]) -> Files:
    """Scenes with boxes and masks, as COCO."""
    for split in SPLITS:
        scene = _cached_scenes(
            source,
            split,
            size=(96, 96),
            digit_size=(22, 50),
            count=(2, 4),
            stream=1,
        )
        for index in range(images[split]):
            yield (
                f'{split}2017/{index:012d}.jpg',
                lambda scene=scene, index=index: _encoded(
                    scene(index).image, 'JPEG', quality=95
                ),
            )
        yield (
            f'annotations/instances_{split}2017.json',
            partial(_coco_annotations, scene, images[split]),
        )


def cityscapes_files(source: Source, images: Dict[str, int]) -> Files:
    """Scenes with label maps, as Cityscapes."""
    label_ids = np.array(CITYSCAPES_LABEL_IDS, dtype=np.uint8)
    for split in SPLITS:
        city = CITIES[split]
        scene = _cached_scenes(
            source,
            split,
            size=(128, 64),
            digit_size=(28, 52),
            count=(2, 4),
            stream=2,
        )
        for index in range(images[split]):
            name = f'{split}/{city}/{city}_{index:06d}_000000'
            yield (
                f'leftImg8bit/{name}_leftImg8bit.png',
                lambda scene=scene, index=index: _encoded(
                    scene(index).image, 'PNG'
                ),
            )
            yield (
                f'gtFine/{name}_gtFine_labelIds.png',
                lambda scene=scene, index=index: _encoded(
                    label_ids[train_ids(scene(index))], 'PNG'
                ),
            )
            yield (
                f'gtFine/{name}_gtFine_labelTrainIds.png',
                lambda scene=scene, index=index: _encoded(
                    train_ids(scene(index)), 'PNG'
                ),
            )


def train_ids(scene: Scene) -> np.ndarray:
    """The scene's Cityscapes train ids, (height, width) uint8."""
    labels = np.full(scene.image.shape[:2], BACKGROUND_TRAIN_ID, np.uint8)
    for digit in scene.digits:
        labels[digit.mask] = digit.label
    return labels


def run_length_encoding(mask: np.ndarray) -> Dict[str, list]:
    """COCO's uncompressed run lengths of a boolean (height, width) mask.

    Runs go down the columns and alternate, beginning with background (of
    length zero where the first pixel is foreground).

    >>> run_length_encoding(np.array([[False, True], [True, True]]))
    {'size': [2, 2], 'counts': [1, 3]}
    """
    flat = np.concatenate(([False], mask.T.reshape(-1)))
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate(([0], changes, [mask.size])))
    return dict(size=list(mask.shape), counts=counts.tolist())


def _cached_scenes(source, split, **kwargs) -> Callable[[int], Scene]:
    """Scenes by index; those just made are kept for the files that follow."""
    return lru_cache(maxsize=4)(
        lambda index: source.scene(split, index, **kwargs)
    )


def _single_digit(source, split, label, index) -> bytes:
    return _encoded(source.digits[split][label][index], 'JPEG', quality=95)


def _coco_annotations(scene, count) -> bytes:
    images, annotations = [], []
    for index in range(count):
        current = scene(index)
        height, width = current.image.shape[:2]
        images.append(
            dict(
                id=index,
                file_name=f'{index:012d}.jpg',
                height=height,
                width=width,
            )
        )
        for digit in current.digits:
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index,
                    category_id=digit.label,
                    bbox=list(digit.box),
                    area=int(digit.mask.sum()),
                    iscrowd=0,
                    segmentation=run_length_encoding(digit.mask),
                )
            )
    categories = [
        dict(id=label, name=str(label), supercategory='digit')
        for label in range(10)
    ]
    return json.dumps(
        dict(
            info=dict(description='MNIST digits on photographs'),
            images=images,
            annotations=annotations,
            categories=categories,
        )
    ).encode()


def _encoded(image: np.ndarray, kind: str, **options) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


LAYOUTS = dict(
    classification=Layout(
        'mnist5k',
        imagenet_files,
        dict(train=4000, val=1000),
        dict(train=4000, val=1000),
    ),
    detection=Layout('digits_coco', coco_files, dict(train=1000, val=100), {}),
    segmentation=Layout(
        'digits_cityscapes', cityscapes_files, dict(train=1000, val=100), {}
    ),
)
