# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The packages whose configs are tried, and how each is imported."""

from __future__ import annotations

import collections
import collections.abc
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

#: Modules that are imported with the networks, but that no network with
#: convolutions of torch's needs -> what needs them.
STAND_INS = {
    'decord': 'data sets',
    'e2cnn': "ReDet's layers, which are none of torch's",
    'imgaug': 'data sets',
    'lyft_dataset_sdk': 'data sets',
    'mmaction.models.localizers.drn': 'DRN, which the wheel leaves out',
    'nuscenes': 'data sets',
    'open3d': 'pictures',
    'xtcocotools': 'evaluation',
}


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
    _stand_in()
    try:
        lifted = _complaint(name)
        with _as_when_released() if lifted else contextlib.nullcontext():
            importlib.import_module(f'{name}.models')
    except Exception as error:  # imports of any package may fail in any way
        kind = type(error).__name__
        raise UserError(f'cannot import {name}: {kind}: {error}') from error
    return Imported(name, sys.modules[name].__version__, lifted)


def _complaint(name: str) -> str:
    """What a package's own check of versions says; empty if nothing.

    Its ``__init__.py`` runs once more for that, because another package may
    have imported it already.
    """
    spec = importlib.util.find_spec(name)
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except AssertionError as error:
        return ' '.join(str(error).split())
    return ''


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
        if not any(part.startswith('_base_') for part in path.parts)
        and path.name != '__init__.py'
    )


@contextlib.contextmanager
def _as_when_released() -> Iterator[None]:
    """Within the context, mmcv and mmdet have versions that all accept.

    And ``collections`` has the names that Python 3.10 took from it.
    """
    versions = {'mmcv': '2.0.1', 'mmdet': '3.0.0'}
    modules = [sys.modules[name] for name in versions if name in sys.modules]
    before = [(module, module.__version__) for module in modules]
    for module in modules:
        module.__version__ = versions[module.__name__]
    collections.Sequence = collections.abc.Sequence
    try:
        yield
    finally:
        del collections.Sequence
        for module, version in before:
            module.__version__ = version


class _AnyName(type):
    """A class whose attributes are classes like it, whatever their names."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return _AnyName(name, (_Anything,), {})


class _Anything(metaclass=_AnyName):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Stand(ModuleType):
    """A module that has any name, and nothing behind it."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything, name)


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of :data:`STAND_INS` that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None):
        if f'{name}.'.startswith(tuple(f'{each}.' for each in STAND_INS)):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Stand(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _stand_in() -> None:
    """Let packages import what their networks do not need."""
    if not any(isinstance(finder, _Absent) for finder in sys.meta_path):
        sys.meta_path.append(_Absent())
