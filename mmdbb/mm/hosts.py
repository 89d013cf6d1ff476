# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The packages that mmdbb extends, and what has to be cured in them.

Two stacks provide the same import names: the OpenMMLab packages and the
maintained forks, whose distributions are named `onedl-*`. What counts is the
version of the module that is imported, whoever ships it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple


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

    @property
    def allowed(self) -> str:
        """The range of versions, as pip writes it."""
        return f'>={self.minimum},<{self.below}'


HOSTS = {
    'mmengine': Host('mmengine', 'onedl-mmengine', '0.10.0', '1.0.0'),
    # mim picks a build that fits the installed torch.
    'mmcv': Host('mmcv', 'onedl-mmcv', '2.0.0', '3.0.0', 'mim install'),
    'mmpretrain': Host('mmpretrain', 'onedl-mmpretrain', '1.2.0', '2.0.0'),
    'mmdet': Host('mmdet', 'onedl-mmdetection', '3.2.0', '4.0.0'),
    'mmseg': Host('mmsegmentation', 'onedl-mmsegmentation', '1.2.0', '2.0.0'),
}


def require(*names: str) -> ModuleType:
    """Import packages of OpenMMLab, of versions that mmdbb works with.

    Args:
        names: Import names, each one of :data:`HOSTS`.

    Returns:
        The module of the first name.

    Raises:
        ValueError: A name is not of such a package.
        ImportError: One is not installed, too old, too new, or refuses the
            packages that it is installed with. One message names all
            packages that are missing, the versions found, the versions
            allowed and the commands that install them.

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
            if error.name != name:  # something that the host itself needs
                raise
            wrong[name] = None
        except AssertionError as error:
            # mmdet and mmseg assert the versions of mmcv and mmengine.
            raise ImportError(f'{name} cannot be imported: {error}') from error
        else:
            if not _is_allowed(name, module.__version__):
                wrong[name] = module.__version__
    if wrong:
        raise ImportError(_complaint(wrong))
    return importlib.import_module(names[0])


def check_version(name: str, found: str) -> None:
    """Raise ImportError unless version `found` of host `name` is allowed."""
    if not _is_allowed(name, found):
        raise ImportError(_complaint({name: found}))


def _is_allowed(name: str, found: str) -> bool:
    host = HOSTS[name]
    return _release(host.minimum) <= _release(found) < _release(host.below)


def _release(version: str) -> Tuple[int, ...]:
    """The numbers of a release: 2.1.0rc1 and 2.1.0+cu118 count as 2.1.0."""
    found = re.match(r'\d+(\.\d+)*', version)
    numbers = [int(part) for part in found[0].split('.')] if found else [0]
    return (*numbers, 0, 0)[:3]


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


def _complaint(wrong: Dict[str, Optional[str]]) -> str:
    """What to say of packages that are missing or of a wrong version.

    Args:
        wrong: Their import names -> the versions found, None for none.
    """
    needs = ' and '.join(
        f'{name} {HOSTS[name].allowed}; found: {found or "not installed"}'
        for name, found in wrong.items()
    )
    own = [f'{h.installer} "{h.distribution}{h.allowed}"' for h in _of(wrong)]
    forks = [f'pip install "{h.fork}{h.allowed}"' for h in _of(wrong)]
    ways = [' && '.join(own), ' && '.join(forks)]
    if any(_installed(host.fork) for host in HOSTS.values()):
        ways = ways[1:]
    elif any(_installed(host.distribution) for host in HOSTS.values()):
        ways = ways[:1]
    return (
        f'mmdbb needs {needs}. Install with: '
        f'{"  or, from the forks:  ".join(ways)}'
    )


def _of(names: Iterable[str]) -> List[Host]:
    return [HOSTS[name] for name in names]
