# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmengine's CheckpointHook, whose files appear whole or not at all.

mmengine removes the old checkpoint, then writes the new one in place: a
process that is killed in between leaves neither. Here each file is written
beside its place and moved there, and the old one goes last.
"""

from __future__ import annotations

import os
from typing import Any

from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing
from mmdbb.mm.host_internals import (
    POINTER,
    RemovingLast,
    best_checkpoints,
    checkpoint_folder,
    forget_best,
)

BACKEND = 'mmdbb_whole'


class WholeFiles(LocalBackend):
    """Local files that are written whole."""

    def put(self, obj: bytes, filepath: str) -> None:
        """Write a file.

        Raises:
            UserError: If it cannot be written; an old one is kept.
        """
        path = os.fspath(filepath)
        with all_or_nothing(path, overwrite=True) as (draft,):
            with open(draft, 'wb') as file:
                file.write(obj)


register_backend(BACKEND, WholeFiles, force=True)


@HOOKS.register_module()
class WholeCheckpointHook(RemovingLast):
    """Saves checkpoints as mmengine's hook, and never loses the last one.

    ``tools/train.py`` puts it in the place of ``CheckpointHook``. A best
    checkpoint that a resumed file names outside of the folder of checkpoints
    is forgotten: it would be removed when a better one comes.

    Args:
        arguments: As of ``CheckpointHook``.

    Examples:
        >>> HOOKS.build(dict(type='WholeCheckpointHook', interval=1)).interval
        1
    """

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        if self.backend_args is None and self.file_client_args is None:
            if '://' not in str(self.out_dir or ''):
                self.backend_args = dict(backend=BACKEND)

    def before_train(self, runner: Runner) -> None:
        """Take over which checkpoints there are.

        Raises:
            UserError: If mmengine's pointer could not be written: a pipe
                would stop the training at its first checkpoint.
        """
        pointer = os.path.join(runner.work_dir, POINTER)
        if os.path.exists(pointer) and not os.path.isfile(pointer):
            raise UserError(
                f'{pointer} is not a file; remove it: it says which '
                'checkpoint was written last'
            )
        for metric, (best, _) in best_checkpoints(runner).items():
            folder = os.path.dirname(os.path.realpath(best))
            if folder != os.path.realpath(self._folder(runner)):
                runner.logger.warning(
                    f'best_ckpt{metric} of the checkpoint is not in '
                    f'{runner.work_dir}, and forgotten: {best}'
                )
                forget_best(runner, metric)
        super().before_train(runner)

    def _folder(self, runner: Runner) -> str:
        """Where :meth:`CheckpointHook.before_train` puts checkpoints."""
        return checkpoint_folder(runner.work_dir, self.out_dir)
