# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The packages that mmdbb extends, and what has to be cured in them.

Two stacks provide the same import names: the OpenMMLab packages and the
maintained forks, whose distributions are named `onedl-*`. What counts is the
version of the module that is imported, whoever ships it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType
from typing import NamedTuple

from packaging.version import Version


class Host(NamedTuple):
    """A host package: its distributions and the versions that are allowed.

    Attributes:
        distribution: What OpenMMLab's package index entry is called.
        fork: What the maintained fork is called there.
        minimum: The oldest version allowed.
        below: The first version that is not allowed any more.
        installer: The command that installs OpenMMLab's distribution.
    """

    distribution: str
    fork: str
    minimum: str
    below: str
    installer: str = 'pip install'


HOSTS = {
    'mmengine': Host('mmengine', 'onedl-mmengine', '0.10.0', '1.0.0'),
    # mim picks a build that fits the installed torch.
    'mmcv': Host('mmcv', 'onedl-mmcv', '2.0.0', '3.0.0', 'mim install'),
    'mmpretrain': Host('mmpretrain', 'onedl-mmpretrain', '1.2.0', '2.0.0'),
    'mmdet': Host('mmdet', 'onedl-mmdetection', '3.2.0', '4.0.0'),
    'mmseg': Host('mmsegmentation', 'onedl-mmsegmentation', '1.2.0', '2.0.0'),
}


def require(name: str) -> ModuleType:
    """Import a host package of a version that mmdbb works with.

    Args:
        name: The import name, one of :data:`HOSTS`.

    Returns:
        The imported module.

    Raises:
        ValueError: `name` is not a host package.
        ImportError: It is not installed, too old, too new, or refuses the
            packages that it is installed with. The message names the
            package, the version found, the versions allowed and the command
            that installs it.

    Example:
        >>> from mmdbb.hosts import require
        >>> require('mmengine').__name__
        'mmengine'
    """
    if name not in HOSTS:
        raise ValueError(
            f'name must be one of {", ".join(HOSTS)}; got {name!r}'
        )
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # something that the host itself needs
            raise
        raise ImportError(_complaint(name, None)) from error
    except AssertionError as error:
        # mmdet and mmseg assert the versions of mmcv and mmengine.
        raise ImportError(f'{name} cannot be imported: {error}') from error
    check_version(name, module.__version__)
    return module


def check_version(name: str, found: str) -> None:
    """Raise ImportError unless version `found` of host `name` is allowed."""
    host = HOSTS[name]
    # By release, so that 2.1.0rc1 or 2.1.0+cu118 count as 2.1.0.
    release = Version(found).release
    if not (
        Version(host.minimum).release <= release < Version(host.below).release
    ):
        raise ImportError(_complaint(name, found))


def cure_config_bases() -> None:
    """Let `_base_ = 'mmseg::...'` find the onedl fork's configs.

    mmengine looks for a distribution called `mmsegmentation`, which the fork
    is not. Where there is none, the module's own name serves: mmengine then
    finds the package by importing it. Takes effect on configs that are read
    afterwards.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    if _installed('mmsegmentation') is None:
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _installed(distribution: str) -> str | None:
    """Return the version of an installed distribution, None without one."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _complaint(name: str, found: str | None) -> str:
    host = HOSTS[name]
    allowed = f'>={host.minimum},<{host.below}'
    commands = [
        f'{host.installer} "{host.distribution}{allowed}"',
        f'pip install "{host.fork}{allowed}"',
    ]
    if _installed(host.fork) is not None:
        commands = commands[1:]
    elif _installed(host.distribution) is not None:
        commands = commands[:1]
    return (
        f'mmdbb needs {name} {allowed}; found: {found or "not installed"}. '
        f'Install it with: {"  or, from the forks:  ".join(commands)}'
    )
