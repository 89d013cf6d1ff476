# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The packages that mmdbb extends, and the versions that it works with.

These packages are called hosts. Two stacks provide the same import names:
the OpenMMLab packages and the maintained forks, whose distributions are named
``onedl-*``. The version of the imported module decides, not the distribution
that it comes from.

``setup.py`` runs this file to read the ranges, so it imports nothing but the
standard library.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType
from typing import Dict, NamedTuple, Optional, Tuple


class MissingHosts(ImportError):
    """Host packages are missing, or have versions that mmdbb does not allow.

    Args:
        message: A text that names all of them, and the command that installs
            them.
        wrong: Import names -> the versions found; None if not installed.
    """

    def __init__(self, message: str, wrong: Dict[str, Optional[str]]) -> None:
        super().__init__(message)
        self.wrong = wrong

    def beside(self, *names: str) -> MissingHosts:
        """Extend the error by other packages that are needed too.

        Args:
            names: Import names to check, each one of :data:`HOSTS`.

        Returns:
            MissingHosts: An error that also names those of them that are
            missing or have a wrong version.
        """
        try:
            require(*names)
        except MissingHosts as error:
            wrong = {**self.wrong, **error.wrong}
            return MissingHosts(_complaint(wrong), wrong)
        except ImportError:  # they need a package that is missing already
            pass
        return self


class Distribution(NamedTuple):
    """A package as pip knows it.

    Attributes:
        name: Name in the package index.
        minimum: Oldest version that mmdbb works with.
        below: Lowest version that is no longer allowed.
    """

    name: str
    minimum: str
    below: str

    @property
    def allowed(self) -> str:
        """The range of versions in pip's syntax."""
        return f'>={self.minimum},<{self.below}'

    def __str__(self) -> str:
        """The requirement in pip's syntax."""
        return f'{self.name}{self.allowed}'

    def has(self, version: str) -> bool:
        """Whether a version lies in the range."""
        low, high = _release(self.minimum), _release(self.below)
        return low <= _release(version) < high


class Host(NamedTuple):
    """The two distributions that provide a package which mmdbb extends.

    Attributes:
        openmmlab: OpenMMLab's distribution.
        onedl: The distribution of the maintained fork.
    """

    openmmlab: Distribution
    onedl: Distribution


#: Import names -> the distributions that provide them. Ranges are set here
#: only: setup.py builds its extras from them, the docs and tests repeat them.
HOSTS = {
    'mmengine': Host(
        Distribution('mmengine', '0.10.0', '1.0.0'),
        Distribution('onedl-mmengine', '0.10.12', '1.0.0'),
    ),
    'mmcv': Host(
        # mmdet 3.3 and mmsegmentation 1.2 refuse mmcv 2.2.
        Distribution('mmcv', '2.0.0', '2.2.0'),
        Distribution('onedl-mmcv', '2.3.6', '3.0.0'),
    ),
    'mmpretrain': Host(
        Distribution('mmpretrain', '1.2.0', '2.0.0'),
        Distribution('onedl-mmpretrain', '1.3.6', '2.0.0'),
    ),
    'mmdet': Host(
        Distribution('mmdet', '3.2.0', '4.0.0'),
        Distribution('onedl-mmdetection', '3.5.1', '4.0.0'),
    ),
    'mmseg': Host(
        Distribution('mmsegmentation', '1.2.0', '2.0.0'),
        Distribution('onedl-mmsegmentation', '1.4.2', '2.0.0'),
    ),
}


def require(*names: str) -> ModuleType:
    """Import packages of OpenMMLab, of versions that mmdbb works with.

    Args:
        names: Import names, each one of :data:`HOSTS`.

    Returns:
        The module of the first name.

    Raises:
        ValueError: If a name is not in :data:`HOSTS`, or none is given.
        ImportError: If a package is not installed, too old, too new, or
            refuses the packages that it is installed with. One message names
            all wrong packages, the versions found and allowed, and one
            command that installs them.

    Example:
        >>> from mmdbb.mm.hosts import require
        >>> require('mmengine').__name__
        'mmengine'
    """
    others = [name for name in names if name not in HOSTS]
    if others or not names:
        raise ValueError(
            f'name must be one of {", ".join(HOSTS)}; got '
            f'{", ".join(map(repr, others)) or "none"}'
        )
    wrong = {}
    for name in names:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Hosts import each other. If one lacks another package, its own
            # error says so.
            if error.name not in HOSTS:
                raise
            wrong[error.name] = None
        except AssertionError as error:
            # mmdet and mmseg assert the versions of mmcv and mmengine.
            raise ImportError(f'{name} cannot be imported: {error}') from error
        else:
            if not _is_allowed(name, module.__version__):
                wrong[name] = module.__version__
    if wrong:
        raise MissingHosts(_complaint(wrong), wrong)
    return importlib.import_module(names[0])


def check_version(name: str, found: str) -> None:
    """Raise ImportError unless a version of a host package is allowed.

    Args:
        name: Import name, one of :data:`HOSTS`.
        found: The version of the module.
    """
    if not _is_allowed(name, found):
        raise MissingHosts(_complaint({name: found}), {name: found})


def is_installed(distribution: str) -> bool:
    """Whether a distribution is installed.

    Args:
        distribution: Its name in the package index.
    """
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_allowed(name: str, found: str) -> bool:
    # The two stacks number their versions independently, so the ranges of
    # either allow a version.
    return any(each.has(found) for each in HOSTS[name])


def _release(version: str) -> Tuple[int, ...]:
    """The numbers of a release: 2.1.0rc1 and 2.1.0+cu118 count as 2.1.0."""
    found = re.match(r'\d+(\.\d+)*', version)
    numbers = [int(part) for part in found[0].split('.')] if found else [0]
    return (*numbers, 0, 0)[:3]


def _complaint(wrong: Dict[str, Optional[str]]) -> str:
    """Write the message for packages that are missing or of a wrong version.

    Args:
        wrong: Import names -> the versions found; None if not installed.
    """
    stack = _stack()
    wanted = {name: getattr(HOSTS[name], stack) for name in wrong}
    needs = [
        f'{name} ({wanted[name].allowed}; '
        + (f'found: {found})' if found else 'not installed)')
        for name, found in wrong.items()
    ]
    if len(needs) > 2:
        needs = [', '.join(needs[:-1]), needs[-1]]
    quoted = ' '.join(f'"{each}"' for each in wanted.values())
    command = f'pip install {quoted}'
    if stack == 'openmmlab' and 'mmcv' in wrong:
        # mim, unlike pip, picks a build of mmcv that fits the torch here.
        command = f'pip install openmim && mim install {quoted}'
    return (
        f'mmdbb needs {" and ".join(needs)}. Install '
        f'{"them" if len(wrong) > 1 else "it"} with: {command}'
    )


def _stack() -> str:
    """Name of the installed stack; OpenMMLab's if none is installed."""
    if any(is_installed(host.onedl.name) for host in HOSTS.values()):
        return 'onedl'
    return 'openmmlab'
