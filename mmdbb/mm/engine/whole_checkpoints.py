# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmengine's CheckpointHook, made safe for a process that is killed.

mmengine removes the old checkpoint, then writes the new one in place. A
process that is killed in between leaves neither. Here the new file is written
under a temporary name and moved to its place; only then is the old one
removed.
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
    """mmengine's backend for local files; each appears whole or not at all."""

    def put(self, obj: bytes, filepath: str) -> None:
        """Write a file.

        Args:
            obj: The content.
            filepath: The path to write to.

        Raises:
            UserError: If the file cannot be written. An existing file is then
                unchanged.
        """
        path = os.fspath(filepath)
        with all_or_nothing(path, overwrite=True) as (draft,):
            with open(draft, 'wb') as file:
                file.write(obj)


register_backend(BACKEND, WholeFiles, force=True)


@HOOKS.register_module()
class WholeCheckpointHook(RemovingLast):
    """Saves checkpoints as mmengine's hook does, and never loses the last one.

    ``tools/train.py`` puts it in the place of ``CheckpointHook``. A resumed
    checkpoint may name a best checkpoint in another folder, for instance of
    an earlier run. The hook forgets that one, because otherwise it would
    remove it when a better one comes.

    Args:
        args: Positional arguments of ``CheckpointHook``.
        arguments: Keyword arguments of ``CheckpointHook``.

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
        """Check the work folder, and take over the best checkpoints so far.

        Raises:
            UserError: If ``last_checkpoint``, in which mmengine names the
                newest checkpoint, is not a file. Writing to a pipe, say,
                would never return.
        """
        pointer = os.path.join(runner.work_dir, POINTER)
        if os.path.exists(pointer) and not os.path.isfile(pointer):
            raise UserError(
                f'{pointer} is not a file; remove it: mmengine writes there '
                'which checkpoint is the newest'
            )
        for metric, (best, _) in best_checkpoints(runner).items():
            folder = os.path.dirname(os.path.realpath(best))
            if folder != os.path.realpath(self._folder(runner)):
                runner.logger.warning(
                    f'best_ckpt{metric} of the checkpoint is not in '
                    f'{runner.work_dir}; it is forgotten: {best}'
                )
                forget_best(runner, metric)
        super().before_train(runner)

    def _folder(self, runner: Runner) -> str:
        """The folder in which ``CheckpointHook`` puts checkpoints."""
        return checkpoint_folder(runner.work_dir, self.out_dir)
