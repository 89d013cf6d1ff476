# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The packages whose configs are tried, and how each is imported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator, List, NamedTuple

from mmdbb.errors import UserError

#: Import names, in the order of the table: those that mmdbb is tested with,
#: then those that have to be asked for (`requirements/hosts.txt`).
PACKAGES = (
    'mmpretrain',
    'mmdet',
    'mmseg',
    'mmpose',
    'mmaction',
    'mmdet3d',
    'mmyolo',
    'mmocr',
    'mmrotate',
)

#: Modules that only the data sets and the pictures of these packages need;
#: the largest has 400 MB.
DATA_ONLY = ('open3d', 'nuscenes', 'lyft_dataset_sdk', 'decord')


class Imported(NamedTuple):
    """A package that is imported, with its networks registered.

    Attributes:
        name: Its import name.
        version: Its version.
        lifted: What its own check of versions says against the packages
            here; empty if it says nothing. The package is imported all the
            same.
    """

    name: str
    version: str
    lifted: str


def installed() -> List[str]:
    """Import names of the packages that are installed here."""
    return [name for name in PACKAGES if importlib.util.find_spec(name)]


def import_package(name: str) -> Imported:
    """Import a package and its networks.

    Most packages assert the versions of mmcv, mmengine and of each other, and
    were last released before the ones that others of them ask for. Such an
    assertion is noted, and the package imported without it.

    Args:
        name: Import name, one of :data:`PACKAGES`.

    Raises:
        UserError: If the package is not installed, or lacks another one.
    """
    lifted = ''
    stand_in_for_data()
    try:
        try:
            package = importlib.import_module(name)
        except AssertionError as error:
            lifted = ' '.join(str(error).split())
            with _last_versions():
                package = importlib.import_module(name)
        importlib.import_module(f'{name}.models')
    except ImportError as error:
        raise UserError(f'cannot import {name}: {error}') from error
    return Imported(name, package.__version__, lifted)


def config_files(name: str) -> List[Path]:
    """The configs that a package installs, without bases.

    Args:
        name: Import name of the package.
    """
    spec = importlib.util.find_spec(name)
    found = []
    for root in spec.submodule_search_locations or ():
        for folder in ('.mim/configs', 'configs'):
            found += (Path(root) / folder).rglob('*.py')
    return sorted(
        path
        for path in found
        if '_base_' not in path.parts and path.name != '__init__.py'
    )


@contextlib.contextmanager
def _last_versions() -> Iterator[None]:
    """Within the context, mmcv and mmdet have versions that all accept."""
    versions = {'mmcv': '2.0.1', 'mmdet': '3.0.0'}
    modules = [sys.modules[name] for name in versions if name in sys.modules]
    before = [(module, module.__version__) for module in modules]
    for module in modules:
        module.__version__ = versions[module.__name__]
    try:
        yield
    finally:
        for module, version in before:
            module.__version__ = version


class _Stand(ModuleType):
    """A module that has any name, and nothing behind it."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of :data:`DATA_ONLY` that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None):
        if name.partition('.')[0] in DATA_ONLY:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Stand(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for_data() -> None:
    """Let packages import what only their data sets and pictures need."""
    if not any(isinstance(finder, _Absent) for finder in sys.meta_path):
        sys.meta_path.append(_Absent())
