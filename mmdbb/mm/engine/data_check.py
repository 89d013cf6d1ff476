# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Check before training that data set, annotations and heads fit together.

What a config alone tells is checked before anything is built, by
:func:`check_data`. The rest is checked by :class:`DataCheckHook`, which any
runner may have. The OpenMMLab packages check little of it: a class too many
ends a training on a GPU with a device assertion, and a name that the
annotations do not have with an error of NumPy's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from mmdbb.errors import UserError
from mmdbb.mm.engine.data_paths import (
    LOADERS,
    DatasetConfig,
    check_data_paths,
    dataset_configs,
)
from mmdbb.mm.engine.random_numbers import random_numbers_kept
from mmdbb.mm.host_internals import built_loader, empty_dataset
from mmdbb.modules import unwrapped

#: Parts of a model whose ``num_classes`` counts the classes of the data set.
HEADS = (
    'head',
    'bbox_head',
    'mask_head',
    'decode_head',
    'auxiliary_head',
    'data_preprocessor',
)
#: How many images and label maps of a data set are looked at.
LOOKED_AT = 8
#: How many labels of images are looked at.
LABELS = 10_000
#: Names that a message lists.
LISTED = 10


def check_data(cfg: Config, loaders: Sequence[str] = LOADERS) -> None:
    """Check a config's data sets by what the config and the files say.

    Paths must exist, the annotations (in COCO's format) must have the
    classes that ``metainfo`` names and boxes of them, and each head must have
    room for the classes. Nothing is built. ``tools/train.py`` calls it; call
    it before ``Runner.from_cfg(cfg)`` elsewhere.

    Args:
        cfg: A training or test config.
        loaders: Names of the dataloaders to check.

    Raises:
        UserError: If something does not fit; the message names the option
            to set.
    """
    check_data_paths(cfg, tuple(loaders))
    for dataset in dataset_configs(cfg, tuple(loaders)):
        classes = _classes_of(dataset)
        if classes is None:
            continue
        for place, count in _heads_in(cfg.get('model'), 'model'):
            _check_count(dataset.key, len(classes), place, count)
        if 'classes' in (dataset.cfg.get('metainfo') or {}):
            _check_names(dataset, classes)
            _check_folders(dataset, classes)


@contextlib.contextmanager
def explained_data() -> Iterator[None]:
    """Within the context a data set without images is a user's mistake.

    Raises:
        UserError: If one is built; the message names its folders.
    """
    try:
        yield
    except ValueError as error:
        dataset = empty_dataset(error)
        if dataset is None:
            raise
        kind = type(dataset).__name__
        places = [*(dataset.data_prefix or {}).values(), dataset.ann_file]
        suffix = getattr(dataset, 'img_suffix', None)
        raise UserError(
            f'the data set {kind} is empty: no image'
            + (f' that ends in {suffix}' if suffix else '')
            + f' in {_some([p for p in places if p])}; set data_root, '
            'ann_file and data_prefix of its dataloader'
            + (', and img_suffix' if suffix else '')
        ) from error


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Checks the data sets of a runner once they are built.

    None may be empty, images must exist, labels must lie below the number of
    classes, and each head must have room for the classes.
    ``tools/train.py`` adds it by itself. It changes nothing, no random number
    either.

    Examples:
        >>> HOOKS.build(dict(type='DataCheckHook')).priority
        'VERY_HIGH'
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Check the data sets that the runner has built.

        Raises:
            UserError: If something does not fit; the message names the
                option to set.
        """
        model = unwrapped(runner.model)
        for loader in LOADERS:
            built = built_loader(runner, loader)
            if built is None:
                continue
            for key, dataset in _parts(built.dataset, f'{loader}.dataset'):
                self._check(runner, key, dataset, model)

    def _check(
        self, runner: Runner, key: str, dataset: Any, model: nn.Module
    ) -> None:
        _check_images(key, dataset)
        metainfo = getattr(dataset, 'metainfo', None) or {}
        classes = metainfo.get('classes')
        if classes is None:
            return
        for place, count in _heads_of(model):
            _check_count(key, len(classes), place, count)
            if len(classes) < count:
                runner.logger.warning(
                    f'{key} has {len(classes)} classes, but {place} has room '
                    f'for {count}: --cfg-options '
                    f'{place}.num_classes={len(classes)} would be enough'
                )
        _check_labels(key, dataset, classes)


# Classes and heads


def _classes_of(dataset: DatasetConfig) -> Optional[Sequence[str]]:
    """The classes of a data set as its config or its class says them."""
    classes = (dataset.cfg.get('metainfo') or {}).get('classes')
    if classes is None:
        known = getattr(dataset.kind, 'METAINFO', None) or {}
        classes = known.get('classes')
    if isinstance(classes, str):  # a file with a class in each line
        return None
    return classes


def _heads_in(fields: Any, place: str) -> Iterator[Tuple[str, int]]:
    """Dotted keys of heads in a model's config, and their classes."""
    if isinstance(fields, (list, tuple)):
        for i, each in enumerate(fields):
            yield from _heads_in(each, f'{place}.{i}')
    if not isinstance(fields, dict):
        return
    if _is_head(place) and isinstance(fields.get('num_classes'), int):
        yield place, fields['num_classes']
    for key, value in fields.items():
        yield from _heads_in(value, f'{place}.{key}')


def _heads_of(model: nn.Module) -> Iterator[Tuple[str, int]]:
    """Dotted keys of a built model's heads, and their classes."""
    for name, module in model.named_modules():
        place = f'model.{name}'
        count = getattr(module, 'num_classes', None)
        if _is_head(place) and isinstance(count, int):
            yield place, count


def _is_head(place: str) -> bool:
    names = [n for n in place.split('.') if not n.isdecimal()]
    return names[-1] in HEADS


def _check_count(key: str, classes: int, place: str, count: int) -> None:
    if classes > count:
        raise UserError(
            f'{key} has {classes} classes, but {place} has num_classes='
            f'{count}; set it by --cfg-options {place}.num_classes={classes}'
        )


# Annotations


def _check_names(dataset: DatasetConfig, classes: Sequence[str]) -> None:
    """Compare names of classes with annotations in COCO's format."""
    if not str(dataset.cfg.get('ann_file', '')).endswith('.json'):
        return
    path = dataset.path('ann_file')
    if not os.path.isfile(path):  # of another place than the local disk
        return
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except ValueError as error:
        raise UserError(
            f'{dataset.key}.ann_file names {path}, which is no JSON file: '
            f'{error}'
        ) from error
    if not isinstance(content, dict) or 'categories' not in content:
        return
    ids = {each['name']: each['id'] for each in content['categories']}
    missing = [name for name in classes if name not in ids]
    if missing:
        raise UserError(
            f'{dataset.key}.metainfo.classes names {_some(missing)}, which '
            f'{path} does not have; it has {_some(list(ids))}'
        )
    wanted = {ids[name] for name in classes}
    count = sum(
        each['category_id'] in wanted
        for each in content.get('annotations', ())
    )
    if not count and dataset.key.startswith('train'):
        raise UserError(
            f'{dataset.key} is empty: none of the '
            f'{len(content.get("images", ()))} images in {path} has a box of '
            f'{_some(classes)}'
        )


def _check_folders(dataset: DatasetConfig, classes: Sequence[str]) -> None:
    """Compare names of classes with the folders of mmpretrain's data set."""
    cfg = dataset.cfg
    # Its subclasses, such as ImageNet, look for their folders elsewhere.
    if (
        getattr(dataset.kind, '__name__', '') != 'CustomDataset'
        or cfg.get('ann_file')
        or not cfg.get('with_label', True)
    ):
        return
    prefix = cfg.get('data_prefix') or ''
    if isinstance(prefix, dict):
        prefix = prefix.get('img_path') or ''
    path = dataset.path('data_prefix', prefix)
    if not os.path.isdir(path):
        return
    folders = sorted(each.name for each in os.scandir(path) if each.is_dir())
    key = f'{dataset.key}.metainfo.classes'
    if len(folders) != len(classes):
        raise UserError(
            f'{key} has {len(classes)} names, but {path} has {len(folders)} '
            f'folders: {_some(folders)}'
        )
    if set(folders) == set(classes) and folders != list(classes):
        raise UserError(
            f'{key} names {_some(classes)}, but the folders are counted in '
            f'alphabetical order: {_some(folders)}'
        )


def _some(names: Sequence[str]) -> str:
    shown = ', '.join(repr(name) for name in names[:LISTED])
    left = len(names) - LISTED
    return f'{shown} and {left} more' if left > 0 else shown or 'none'


# Data sets that are built


def _parts(dataset: Any, key: str) -> Iterator[Tuple[str, Any]]:
    """The data sets within wrappers, and their keys in the config."""
    inner = getattr(dataset, 'dataset', None)
    several = getattr(dataset, 'datasets', None)
    if inner is not None:
        yield from _parts(inner, f'{key}.dataset')
    elif isinstance(several, (list, tuple)):
        for i, each in enumerate(several):
            yield from _parts(each, f'{key}.datasets.{i}')
    else:
        yield key, dataset


def _spread(count: int, most: int = LOOKED_AT) -> List[int]:
    """Indices at even distances; data sets are often sorted by class."""
    places = np.linspace(0, count - 1, min(count, most))
    return sorted(set(places.round().astype(int).tolist()))


def _check_images(key: str, dataset: Any) -> None:
    if not len(dataset):
        raise UserError(
            f'{key} is empty; look at {key}.data_root, {key}.ann_file and '
            f'{key}.data_prefix'
        )
    if not hasattr(dataset, 'get_data_info'):
        return
    for index in _spread(len(dataset)):
        info = dataset.get_data_info(index)
        for field, prefix in (
            ('img_path', _prefix(dataset, ('img', 'img_path'))),
            ('seg_map_path', _prefix(dataset, ('seg_map_path', 'seg'))),
        ):
            path = info.get(field)
            if not isinstance(path, str) or re.match(r'\w+:', path):
                continue
            if not os.path.exists(path):
                raise UserError(
                    f'{key} has an image that does not exist: {path}; set '
                    f'{key}.data_root or {key}.data_prefix{prefix}'
                )


def _prefix(dataset: Any, names: Sequence[str]) -> str:
    known = getattr(dataset, 'data_prefix', None) or {}
    return next((f'.{name}' for name in names if name in known), '')


def _check_labels(key: str, dataset: Any, classes: Sequence[str]) -> None:
    """Labels of images, or of the pixels of some label maps."""
    if hasattr(dataset, 'get_data_info'):
        found = [
            dataset.get_data_info(index).get('gt_label')
            for index in _spread(len(dataset), LABELS)
        ]
        # Some data sets have no labels, others several for an image.
        labels = [label for label in found if isinstance(label, int)]
        _check_range(key, 'labels', np.array(labels, int), classes)
    ignored = getattr(dataset, 'ignore_index', None)
    if ignored is None or getattr(dataset, 'test_mode', False):
        return
    with random_numbers_kept():
        for index in _spread(len(dataset)):
            sample = dataset[index]
            data = sample.get('data_samples')
            if data is None or 'gt_sem_seg' not in data:
                return
            values = np.unique(data.gt_sem_seg.data.cpu().numpy())
            what = f'pixels of {data.get("seg_map_path", "label maps")}'
            _check_range(key, what, values[values != ignored], classes)


def _check_range(
    key: str, what: str, labels: np.ndarray, classes: Sequence[str]
) -> None:
    wrong = np.unique(labels[(labels < 0) | (labels >= len(classes))])
    if wrong.size:
        raise UserError(
            f'{key} has {len(classes)} classes, and {what} have the labels '
            f'{_some(wrong.tolist())}; labels must lie between 0 and '
            f'{len(classes) - 1}'
        )
