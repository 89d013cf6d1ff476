# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Build a release's two files, and check them as a package index would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import List

from mmdbb.errors import UserError


def build_release(root: Path, out: Path) -> List[Path]:
    """Build the source archive, and the wheel from what the archive holds.

    Args:
        root: The checkout.
        out: A folder that has no files yet.

    Returns:
        list: The two files.

    Raises:
        UserError: The folder holds files, or a step fails.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f'{out} holds files already; remove them first')
    # Without --wheel or --sdist the wheel is built from the archive.
    _run('build', '--no-isolation', '--outdir', str(out), str(root))
    files = sorted(out.iterdir())
    _run('twine', 'check', '--strict', *map(str, files))
    return files


def _run(module: str, *arguments: str) -> None:
    command = [sys.executable, '-W', 'ignore', '-m', module, *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise UserError(f'{module} failed')
