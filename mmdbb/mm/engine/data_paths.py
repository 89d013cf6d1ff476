# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Paths of data sets in a config: checked before anything is built.

mmengine opens them after it has built the network, and raises the system's
error, which does not say where the path came from.
"""

from __future__ import annotations

import inspect
import os
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import DATASETS

from mmdbb.errors import UserError

#: Dataloaders of a config, in the order in which they are checked.
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
#: Evaluators of a config that read annotations by themselves.
EVALUATORS = ('val_evaluator', 'test_evaluator')


class DatasetConfig(NamedTuple):
    """The config of a data set that reads files.

    Attributes:
        key: Its dotted key in the whole config, as `--cfg-options` takes it.
        cfg: The config of the data set.
        kind: Its class; None if no package that is installed has it.
    """

    key: str
    cfg: Dict[str, Any]
    kind: Optional[type]

    def path(self, field: str, value: Optional[str] = None) -> str:
        """A path as the data set reads it.

        Args:
            field: The field that names it, such as ``ann_file``.
            value: The path in it; by default the field's value.
        """
        value = self.cfg[field] if value is None else value
        root = self.cfg.get('data_root') or ''
        return value if os.path.isabs(value) else os.path.join(root, value)


def dataset_configs(
    cfg: Config, loaders: Tuple[str, ...] = LOADERS
) -> Iterator[DatasetConfig]:
    """The data sets of a config, those within wrappers too.

    Args:
        cfg: The config.
        loaders: Names of the dataloaders to look into.
    """
    scope = cfg.get('default_scope')
    for loader in loaders:
        found = cfg.get(loader)
        if not isinstance(found, dict):
            continue
        dataset = found.get('dataset')
        if isinstance(dataset, dict):
            for key, inner in _unwrapped(dataset, f'{loader}.dataset'):
                yield DatasetConfig(key, inner, _class(inner, scope))


def _class(cfg: Dict[str, Any], scope: Optional[str]) -> Optional[type]:
    kind = cfg.get('type')
    if not isinstance(kind, str):
        return kind
    with DATASETS.switch_scope_and_registry(scope) as registry:
        return registry.get(kind)


def _unwrapped(
    cfg: Dict[str, Any], key: str
) -> Iterator[Tuple[str, Dict[str, Any]]]:
    inner = cfg.get('dataset')
    if isinstance(inner, dict):
        yield from _unwrapped(inner, f'{key}.dataset')
        return
    several = cfg.get('datasets')
    if isinstance(several, (list, tuple)):
        for i, each in enumerate(several):
            yield from _unwrapped(each, f'{key}.datasets.{i}')
        return
    yield key, cfg


def check_data_paths(cfg: Config, loaders: Tuple[str, ...] = LOADERS) -> None:
    """Check that the files and folders of a config's data sets exist.

    Args:
        cfg: The config.
        loaders: Names of the dataloaders to check.

    Raises:
        UserError: If one does not exist. The message names the field, and
            the option that sets it.
    """
    for dataset in dataset_configs(cfg, loaders):
        if not _is_local(dataset.cfg) or _downloads(dataset):
            continue
        _check_dataset(dataset)
    splits = {loader.partition('_')[0] for loader in loaders}
    for name in EVALUATORS:
        found = cfg.get(name) if name.partition('_')[0] in splits else None
        several = found if isinstance(found, (list, tuple)) else [found]
        for i, each in enumerate(several):
            key = f'{name}.{i}' if several is found else name
            if isinstance(each, dict) and _is_local(each):
                _check_file(f'{key}.ann_file', each.get('ann_file'))


def _check_dataset(dataset: DatasetConfig) -> None:
    key, cfg = dataset.key, dataset.cfg
    root = cfg.get('data_root')
    if _is_path(root) and not os.path.isdir(root):
        raise UserError(
            f'{key}.data_root names {root}, which is no folder; name yours '
            f'by --cfg-options {key}.data_root=FOLDER'
        )
    if _is_path(cfg.get('ann_file')):
        _check_file(f'{key}.ann_file', dataset.path('ann_file'), root)
    prefix = cfg.get('data_prefix')
    fields = prefix.items() if isinstance(prefix, dict) else [('', prefix)]
    for name, value in fields:
        place = f'{key}.data_prefix' + (f'.{name}' if name else '')
        path = dataset.path('', value) if _is_path(value) else root
        # A prefix may be the start of names too: that is a file's matter.
        if _is_path(value) and not os.path.isdir(os.path.dirname(path)):
            raise UserError(_no_folder(place, path))
        if _is_path(value) and value.endswith('/') and not os.path.isdir(path):
            raise UserError(_no_folder(place, path))


def _no_folder(place: str, path: str) -> str:
    return (
        f'{place} names {path}, which is no folder; name yours by '
        f'--cfg-options {place}=FOLDER'
    )


def _check_file(place: str, path: Any, root: Optional[str] = None) -> None:
    if not _is_path(path) or os.path.isfile(path) or '*' in path:
        return
    if os.path.isdir(path):  # some data sets have one file an image
        return
    within = f' (within data_root {root})' if root else ''
    raise UserError(
        f'{place} names {path}, which does not exist{within}; name yours by '
        f'--cfg-options {place}=FILE'
    )


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and '://' not in value


def _is_local(cfg: Dict[str, Any]) -> bool:
    backend = cfg.get('backend_args') or cfg.get('file_client_args') or {}
    return backend.get('backend', 'local') in ('local', 'disk')


def _downloads(dataset: DatasetConfig) -> bool:
    """Whether a data set fetches its files by itself, as CIFAR's does."""
    for cls in getattr(dataset.kind, '__mro__', ()):
        init = vars(cls).get('__init__')
        if init and 'download' in inspect.signature(init).parameters:
            return bool(dataset.cfg.get('download', True))
    return False
