# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A trained network of each task, made once a session."""

import functools

import pytest

pytest.importorskip('mlxtend')
pytest.importorskip('sklearn')

from mmengine.config import Config  # noqa: E402
from tiny_demo import TASKS, tiny_checkpoint, tiny_config  # noqa: E402


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """From a task to its config and the path of a checkpoint."""
    root = tmp_path_factory.mktemp('trained')

    @functools.cache
    def make(task):
        cfg = tiny_config(task, root)
        cfg.dump(root / f'{task}.py')
        cfg = Config.fromfile(root / f'{task}.py')
        return cfg, tiny_checkpoint(cfg, root / f'{task}.pth')

    return make


@pytest.fixture(scope='session')
def sizes():
    """By task, height and width of the images in pixels."""
    return {task: size for task, (_, _, size) in TASKS.items()}
