# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What an earlier call of the demo has left in the work folder.

The folder says what was trained in it. A call for the same goes on from the
newest checkpoint; a call for something else starts anew.
"""

import json
from pathlib import Path

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing

#: Written into the work folder by all stages, and the sign that it is ours.
LOG = 'demo.log'
#: What is trained in it.
STARTED = 'demo.json'


def claim(work: Path) -> Path:
    """Make a folder the demo's own, or raise if it holds other files.

    Args:
        work: The folder, which may be missing.

    Raises:
        UserError: If it is no folder, or somebody else's.
    """
    if work.exists() and not work.is_dir():
        raise UserError(f'{work} is not a folder; choose another --work-dir')
    if work.is_dir() and any(work.iterdir()) and not (work / LOG).exists():
        raise UserError(f'{work} holds other files; choose another --work-dir')
    work.mkdir(parents=True, exist_ok=True)
    (work / LOG).touch()
    return work


def goes_on(work: Path, what: dict, checkpoints: str) -> bool:
    """Whether checkpoints of the same training are there to go on from.

    Those of another training are removed.

    Args:
        work: The demo's folder.
        what: All that decides the training, as JSON has it.
        checkpoints: Pattern of the checkpoints' names.
    """
    try:
        same = json.loads((work / STARTED).read_text()) == what
    except (OSError, ValueError):
        same = False
    found = sorted(work.glob(checkpoints))
    if not same:
        for path in [*found, work / 'last_checkpoint']:
            path.unlink(missing_ok=True)
        started = str(work / STARTED)
        with all_or_nothing(started, overwrite=True) as drafts:
            Path(drafts[0]).write_text(json.dumps(what, indent=1))
    return same and bool(found)
