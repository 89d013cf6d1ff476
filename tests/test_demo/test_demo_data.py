# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The demo's data sets: what is in them, and when they are written."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from workshop.demo import layouts
from workshop.demo.layouts import (
    BACKGROUND_TRAIN_ID,
    CITYSCAPES_LABEL_IDS,
    LAYOUTS,
    run_length_encoding,
)
from workshop.demo.prepare import MARKER, prepare
from workshop.demo.scenes import Source

from mmdbb.errors import UserError

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
TASKS = list(LAYOUTS)
FEW = dict(train=10, val=10)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize('task', TASKS)
def test_same_seed_gives_the_same_files(task, tmp_path):
    first = prepare(task, tmp_path / 'a', **FEW)
    again = prepare(task, tmp_path / 'b', **FEW)
    other = prepare(task, tmp_path / 'c', seed=1, **FEW)
    assert contents(first) == contents(again)
    assert contents(first).keys() == contents(other).keys()
    assert contents(first) != contents(other)


@pytest.mark.parametrize('task', TASKS)
def test_complete_data_are_left_alone(task, tmp_path, monkeypatch):
    folder = prepare(task, tmp_path, **FEW)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    # Not even the digits are read.
    monkeypatch.setattr(Source, 'digits', property(lambda self: 1 / 0))
    prepare(task, tmp_path, **FEW)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    assert before == after


@pytest.mark.parametrize('task', TASKS)
def test_interrupted_data_are_completed(task, tmp_path, monkeypatch):
    whole = contents(prepare(task, tmp_path / 'whole', **FEW))
    written = []
    encoded = layouts._encoded

    def interrupted(*args, **kwargs):
        written.append(1)
        if len(written) == 7:
            raise KeyboardInterrupt
        return encoded(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layouts, '_encoded', interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(task, tmp_path, **FEW)
    folder = tmp_path / LAYOUTS[task].name
    part = contents(folder)
    assert 1 < len(part) < len(whole)
    assert not any(name.endswith('.part') for name in part)
    prepare(task, tmp_path, **FEW)
    assert contents(folder) == whole


def test_files_of_others_are_not_overwritten(tmp_path):
    folder = tmp_path / LAYOUTS['detection'].name
    folder.mkdir()
    (folder / 'mine.txt').write_text('mine')
    with pytest.raises(UserError, match='was not made by this tool'):
        prepare('detection', tmp_path, **FEW)
    assert contents(folder) == {'mine.txt': b'mine'}


def test_another_demo_data_set_is_not_mixed_with(tmp_path):
    folder = prepare('detection', tmp_path, **FEW)
    before = contents(folder)
    with pytest.raises(UserError, match='another demo data set.*seed 0'):
        prepare('detection', tmp_path, seed=1, **FEW)
    assert contents(folder) == before


def test_damaged_marker_is_an_error(tmp_path):
    folder = prepare('detection', tmp_path, **FEW)
    (folder / MARKER).write_text('{')
    with pytest.raises(UserError, match='cannot use'):
        prepare('detection', tmp_path, **FEW)


@pytest.mark.parametrize(
    ('task', 'train'),
    [('classification', 15), ('classification', 4010), ('detection', 0)],
)
def test_wrong_number_of_images_is_an_error(task, train, tmp_path):
    with pytest.raises(UserError, match=f'train images.*got {train}'):
        prepare(task, tmp_path, train=train, val=10)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('module', ['mlxtend', 'sklearn'])
def test_missing_package_is_named(module, tmp_path):
    hidden = tmp_path / 'hidden' / module
    hidden.mkdir(parents=True)
    (hidden / '__init__.py').write_text(
        f"raise ModuleNotFoundError('No module named {module}')"
    )
    code = (
        f'import sys; sys.path.insert(0, {str(hidden.parent)!r});'
        f'sys.argv = {["t", "--root", str(tmp_path), "--task", "detection"]};'
        f'sys.path.insert(0, {str(TOOLS)!r});'
        f'import runpy; runpy.run_path({str(TOOLS / "prepare_demo_data.py")!r}'
        ", run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f'the demo needs {module} (No module named {module})' in line
    assert line.endswith('pip install -e ".[demo]"')


def test_splits_share_no_digit():
    digits = Source(0).digits
    seen = {
        split: {digit.tobytes() for label in by_label for digit in label}
        for split, by_label in digits.items()
    }
    assert len(seen['train']) == 4000
    assert len(seen['val']) == 1000
    assert not seen['train'] & seen['val']


def test_imagenet_layout(tiny_data):
    folder = tiny_data / 'mnist5k'
    for split, each in (('train', 4), ('val', 2)):
        lines = (folder / 'meta' / f'{split}.txt').read_text().splitlines()
        assert len(lines) == 10 * each
        for line in lines:
            name, label = line.split()
            assert name.startswith(f'{label}/')
            assert read(folder / split / name).shape == (28, 28)
        listed = {line.split()[0] for line in lines}
        assert listed == {
            path.relative_to(folder / split).as_posix()
            for path in (folder / split).rglob('*.JPEG')
        }


@pytest.mark.parametrize('split', ['train', 'val'])
def test_coco_boxes_lie_around_the_digits(split, tiny_data):
    folder = tiny_data / 'digits_coco'
    path = folder / 'annotations' / f'instances_{split}2017.json'
    coco = json.loads(path.read_text())
    assert [c['id'] for c in coco['categories']] == list(range(10))
    ids = [annotation['id'] for annotation in coco['annotations']]
    assert len(set(ids)) == len(ids)
    images = {image['id']: image for image in coco['images']}
    taken = {}
    for annotation in coco['annotations']:
        image = images[annotation['image_id']]
        pixels = read(folder / f'{split}2017' / image['file_name'])
        assert pixels.shape == (image['height'], image['width'], 3)
        mask = decoded(annotation['segmentation'])
        assert mask.shape == pixels.shape[:2]
        assert mask.sum() == annotation['area']
        x, y, width, height = annotation['bbox']
        assert x >= 0 and y >= 0
        assert x + width <= image['width'] and y + height <= image['height']
        # The digit touches all four sides of its box, and leaves it nowhere.
        rows, columns = np.nonzero(mask)
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        others = taken.setdefault(image['id'], np.zeros_like(mask))
        assert not (others & mask).any()
        others |= mask
    assert taken.keys() == images.keys()


def decoded(rle):
    """A mask from COCO's run lengths, down the columns."""
    values = np.arange(len(rle['counts'])) % 2
    flat = np.repeat(values, rle['counts'])
    return flat.reshape(rle['size'][::-1]).T.astype(bool)


def test_run_lengths_are_what_pycocotools_reads():
    mask_utils = pytest.importorskip('pycocotools.mask')
    rng = np.random.default_rng(0)
    for first in (False, True):
        mask = rng.random((5, 7)) < 0.4
        mask[0, 0] = first
        rle = run_length_encoding(mask)
        assert sum(rle['counts']) == mask.size
        read_back = mask_utils.decode(mask_utils.frPyObjects(rle, 5, 7))
        np.testing.assert_array_equal(read_back, mask)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_cityscapes_label_ids_map_to_train_ids(split, tiny_data):
    folder = tiny_data / 'digits_cityscapes'
    images = sorted((folder / 'leftImg8bit' / split).rglob('*.png'))
    assert len(images) == dict(train=8, val=4)[split]
    train_id_of = np.full(256, 255)
    train_id_of[list(CITYSCAPES_LABEL_IDS)] = np.arange(19)
    present = set()
    for image in images:
        relative = image.relative_to(folder / 'leftImg8bit').as_posix()
        assert relative.split('/')[2].startswith(relative.split('/')[1])
        stem = folder / 'gtFine' / relative.removesuffix('_leftImg8bit.png')
        label_ids = read(f'{stem}_gtFine_labelIds.png')
        train_ids = read(f'{stem}_gtFine_labelTrainIds.png')
        assert label_ids.dtype == train_ids.dtype == np.uint8
        assert label_ids.shape == read(image).shape[:2]
        np.testing.assert_array_equal(train_id_of[label_ids], train_ids)
        present |= set(np.unique(train_ids).tolist())
    assert present <= set(range(BACKGROUND_TRAIN_ID + 1))
    assert BACKGROUND_TRAIN_ID in present
    assert len(present) > 3


def test_digits_stand_out_from_the_photograph():
    source = Source(0)
    luminance = np.array([0.299, 0.587, 0.114])
    for index in range(10):
        scene = source.scene('train', index, (128, 96), (24, 40), (2, 4))
        assert scene.image.shape == (96, 128, 3)
        assert scene.digits
        for digit in scene.digits:
            x, y, width, height = digit.box
            inside = np.zeros_like(digit.mask)
            inside[y : y + height, x : x + width] = True
            grey = scene.image @ luminance
            on, off = grey[digit.mask], grey[inside & ~digit.mask]
            # A box around a stroke may hold little else.
            if off.size > 50:
                assert abs(on.mean() - off.mean()) > 25
