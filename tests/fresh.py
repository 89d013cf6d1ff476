"""Environments that have torch and nothing else, made without a network."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE')
TREES = ('mmdbb', 'configs', 'tools')
#: A requirement's name, and the extra that it is of.
NAME = re.compile(r'[\w.-]+')
EXTRA = re.compile(r';.*\bextra\s*==')


def checkout(folder):
    """A copy of the checkout, so that building leaves no trace in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*BUILD, 'README.md', 'model-index.yml'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    for tree in TREES:
        shutil.copytree(
            ROOT / tree,
            folder / tree,
            ignore=shutil.ignore_patterns('.mim', '__pycache__'),
        )
    return folder


def pip(*arguments, cwd):
    """Run the tests' own pip, without a network."""
    if arguments[0] == 'install':
        # Else pip removes the mmdbb that the tests run from.
        arguments += ('--ignore-installed',)
    subprocess.run(
        [sys.executable, '-m', 'pip', '--disable-pip-version-check']
        + [*arguments, '--no-deps', '--no-build-isolation', '--no-index'],
        check=True,
        cwd=cwd,
        capture_output=True,
    )


def distributions(*names):
    """Names of packages and of all that they require, as installed here."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r'[-_.]+', '-', waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, say
        waiting += [
            NAME.match(line)[0]
            for line in found[name].requires or ()
            if not EXTRA.search(line)
        ]
    return found


class Fresh:
    """An environment with torch, numpy and what torch requires.

    Args:
        folder: Where to make it.
    """

    def __init__(self, folder):
        subprocess.run(
            [sys.executable, '-m', 'venv', '--without-pip', str(folder)],
            check=True,
        )
        self.folder = folder
        self.python = folder / 'bin' / 'python'
        self.site = Path(
            sysconfig.get_path('purelib', vars={'base': str(folder)})
        )
        for distribution in distributions('torch', 'numpy').values():
            self._link(distribution)

    def _link(self, distribution):
        if not distribution.files:
            pytest.skip(f'nobody knows the files of {distribution.name}')
        tops = {file.parts[0] for file in distribution.files}
        for top in sorted(tops - {'..', '__pycache__'}):
            place = self.site / top
            source = Path(distribution.locate_file(top))
            if source.exists() and not place.exists():
                place.symlink_to(source)

    def install(self, folder, *options):
        """Install a checkout by ``pip install . --prefix``."""
        pip('install', *options, '.', '--prefix', str(self.folder), cwd=folder)

    def run(self, *arguments, cwd):
        """What its Python prints; it must end well."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith('PYTHON')
        }
        run = subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout
