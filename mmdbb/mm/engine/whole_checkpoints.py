# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmengine's CheckpointHook, whose files appear whole or not at all.

mmengine removes the old checkpoint, then writes the new one in place: a
process that is killed in between leaves neither. Here each file is written
beside its place and moved there, and the old one goes last.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Iterator, List, Tuple

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing

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


class _Later:
    """A file backend that removes nothing yet."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        #: What to remove, and the method that does.
        self.removals: List[Tuple[Any, str]] = []

    def remove(self, path: str) -> None:
        self.removals.append((self.backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.removals.append((self.backend.rmtree, path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
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
        pointer = os.path.join(runner.work_dir, 'last_checkpoint')
        if os.path.exists(pointer) and not os.path.isfile(pointer):
            raise UserError(
                f'{pointer} is not a file; remove it: it says which '
                'checkpoint was written last'
            )
        infos = runner.message_hub.runtime_info
        for name in [n for n in infos if n.startswith('best_ckpt')]:
            folder = os.path.dirname(os.path.realpath(str(infos[name])))
            if folder != os.path.realpath(self._folder(runner)):
                runner.logger.warning(
                    f'{name} of the checkpoint is not in {runner.work_dir}, '
                    f'and forgotten: {infos[name]}'
                )
                infos[name] = None
        super().before_train(runner)

    def _folder(self, runner: Runner) -> str:
        """Where :meth:`CheckpointHook.before_train` puts checkpoints."""
        return checkpoint_folder(runner.work_dir, self.out_dir)

    def _save_checkpoint_with_step(self, *args: Any, **kwargs: Any) -> None:
        with self._removing_last():
            super()._save_checkpoint_with_step(*args, **kwargs)

    def _save_best_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._removing_last():
            super()._save_best_checkpoint(*args, **kwargs)

    @contextlib.contextmanager
    def _removing_last(self) -> Iterator[None]:
        backend = self.file_backend
        if isinstance(backend, _Later):  # saving the best saves the last too
            yield
            return
        self.file_backend = _Later(backend)
        try:
            yield
            removals = self.file_backend.removals
        finally:
            self.file_backend = backend
        kept = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}
        kept.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        for remove, path in removals:
            if path not in kept:  # written again under its name
                remove(path)


def checkpoint_folder(work_dir: str, out_dir: Any = None) -> str:
    """The folder that ``CheckpointHook`` writes to.

    Args:
        work_dir: Of the run.
        out_dir: Of the hook.
    """
    if out_dir is None or str(out_dir) == work_dir:
        return work_dir
    return os.path.join(out_dir, os.path.basename(work_dir.rstrip(os.sep)))
