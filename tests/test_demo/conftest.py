# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Tiny data sets of the demo, written once a session."""

import pytest

pytest.importorskip('mlxtend')
pytest.importorskip('sklearn')

from workshop.demo.prepare import prepare  # noqa: E402

TINY = dict(classification=(40, 20), detection=(8, 4), segmentation=(8, 4))


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
    """The folder with the three data sets, each of some images."""
    root = tmp_path_factory.mktemp('data')
    for task, (train, val) in TINY.items():
        prepare(task, root, train=train, val=val)
    return root


@pytest.fixture(scope='session')
def tiny_images():
    """By task, the images that the data sets train and validate on."""
    return TINY
