"""Detectors exported to their boxes find what mmdet finds."""

import json
import os

import pytest
import torch
from detectors import DETECTORS, SIZE, detector, host_boxes, images
from helpers import export

from mmdbb.errors import UserError
from mmdbb.mm.export.boxes import box_detector
from mmdbb.mm.export.same_boxes import ALONE, all_boxes, box_errors

pytestmark = pytest.mark.usefixtures('quiet')


def assert_same(dets, labels, expected, tolerance=1e-5):
    """The same boxes in the same order, then nothing."""
    assert len(dets) == len(labels) == len(expected)
    for mine, label, theirs in zip(dets, labels, expected):
        count = len(theirs)
        assert (label >= 0).sum() == count
        assert label[:count].tolist() == theirs.labels.tolist()
        assert (label[count:] == -1).all() and not mine[count:].any()
        boxes = mine[:count, :4] - theirs.bboxes
        assert (boxes.abs() <= tolerance * max(SIZE)).all()
        assert ((mine[:count, 4] - theirs.scores).abs() <= tolerance).all()


@pytest.mark.parametrize('name', DETECTORS)
def test_boxes_are_those_of_mmdet(name):
    """Also of any score, where there are more than may be left."""
    model = detector(name)
    for size in (SIZE, (96, 64)):
        batch = images(3, size, seed=1)
        module = box_detector(model, batch[:1]).eval()
        with torch.no_grad():
            dets, labels = module(batch)
        expected = host_boxes(model, batch)
        counts = [len(boxes) for boxes in expected]
        assert any(0 < count for count in counts)
        assert_same(dets, labels, expected)
    with all_boxes(model), torch.no_grad():
        module = box_detector(model, batch).eval()
        expected = host_boxes(model, batch)
        assert all(len(boxes) == 12 for boxes in expected)
        assert_same(*module(batch), expected)


CHANGES = {
    'no suppression': ('FCOS', dict(test_cfg__nms=None)),
    'softmax': (
        'RetinaNet',
        dict(
            bbox_head__loss_cls=dict(
                type='CrossEntropyLoss', use_sigmoid=False
            )
        ),
    ),
    'no border': (
        'RetinaNet',
        dict(
            bbox_head__bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', clip_border=False
            )
        ),
    ),
    'one box for all classes': (
        'FasterRCNN',
        dict(roi_head__bbox_head__reg_class_agnostic=True),
    ),
    'old RoIAlign': (
        'FasterRCNN',
        dict(
            roi_head__bbox_roi_extractor__roi_layer=dict(
                type='RoIAlign',
                output_size=3,
                aligned=False,
                sampling_ratio=2,
            )
        ),
    ),
}


@pytest.mark.parametrize('change', CHANGES)
def test_configs_are_followed(change):
    name, changes = CHANGES[change]
    model, batch = detector(name, **changes), images(2, seed=2)
    with all_boxes(model), torch.no_grad():
        module = box_detector(model, batch).eval()
        assert_same(*module(batch), host_boxes(model, batch))


#: Detectors that are written into files here: one of each kind. All of them
#: with `make test-boxes`, as exporting takes seconds.
FILES = ('FCOS', 'FasterRCNN')
if 'MMDBB_ALL_DETECTORS' in os.environ:
    FILES = tuple(DETECTORS)


@pytest.mark.parametrize('name', FILES)
def test_files_with_boxes(name, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    model = detector(name)
    path = tmp_path / 'a.onnx'
    result = export(model, path, head='boxes', image_size=SIZE)
    assert result.blocks == 2
    assert result.difference.compared == ('dets', 'labels')
    assert result.difference.largest < 1e-5
    session = ort.InferenceSession(path)
    batch = images(3, seed=3)
    dets, labels = session.run(None, {'images': batch.numpy()})
    expected = host_boxes(model, batch)
    assert sum(len(boxes) for boxes in expected)
    found = torch.from_numpy(dets), torch.from_numpy(labels)
    assert_same(*found, expected)
    notes = json.loads(session.get_modelmeta().custom_metadata_map['mmdbb'])
    assert notes['outputs'] == ['dets', 'labels']


REFUSED = {
    'soft': (
        'RetinaNet',
        dict(test_cfg__nms=dict(type='soft_nms', iou_threshold=0.5)),
        'only type nms with',
    ),
    'endless': ('FCOS', dict(test_cfg__max_per_img=-1), 'no max_per_img'),
    'pooled': ('FasterRCNN', dict(), 'only RoIAlign with averages'),
    'own loss': ('FasterRCNN', dict(), 'a loss with scores of its own'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_exported_is_refused(case):
    name, changes, match = REFUSED[case]
    model = detector(name)
    if case == 'pooled':
        model.roi_head.bbox_roi_extractor.roi_layers[1].pool_mode = 'max'
    if case == 'own loss':
        model.roi_head.bbox_head.loss_cls.custom_cls_channels = True
    cfg = (getattr(model, 'roi_head', None) or model.bbox_head).test_cfg
    for key, value in changes.items():
        if key.startswith('test_cfg'):
            cfg[key.partition('__')[2]] = value
    with pytest.raises(UserError, match=match):
        box_detector(model, images(1))


def test_heads_of_their_own_and_other_networks_are_refused(tmp_path):
    model = detector('FasterRCNN')
    model.roi_head = None
    with pytest.raises(UserError, match='for two-stage detectors only'):
        box_detector(model, images(1))
    model = detector('FasterRCNN')
    model.rpn_head = detector('RetinaNet').bbox_head
    with pytest.raises(UserError, match='only an RPNHead can be exported'):
        box_detector(model, images(1))
    model = detector('RetinaNet')
    kind = type(model.bbox_head)
    model.bbox_head.__class__ = type(
        'OwnHead', (kind,), dict(_bbox_post_process=lambda self, **k: None)
    )
    with pytest.raises(UserError, match='OwnHead decodes its boxes in a way'):
        box_detector(model, images(1))
    with pytest.raises(UserError, match='not of Conv2d'):
        box_detector(torch.nn.Conv2d(3, 3, 1), images(1))
    for format in ('torchscript', 'torch.export'):
        with pytest.raises(UserError, match='boxes are for the format onnx'):
            suffix = '.pt' if format == 'torchscript' else '.pt2'
            export(model, tmp_path / f'a{suffix}', format, head='boxes')
    with pytest.raises(UserError, match="head must be False, True or 'boxes'"):
        export(model, tmp_path / 'a.onnx', head='all')


def test_comparing_boxes_bites():
    """A shifted box, another label, another score, and one too many."""
    dets = torch.tensor([[[10.0, 10, 30, 40, 0.9], [50, 5, 60, 50, 0.5]]])
    labels = torch.tensor([[1, 2]])
    size = (100, 200)

    def error(new_dets=dets, new_labels=labels):
        return box_errors((new_dets, new_labels), (dets, labels), size)

    assert error() == dict(dets=0.0, labels=0.0)
    swapped = error(dets.flip(1), labels.flip(1))
    assert swapped == dict(dets=0.0, labels=0.0)
    shifted = dets.clone()
    shifted[0, 0, 2] += 0.5
    assert abs(error(shifted)['dets'] - 0.5 / 200) < 1e-9
    scored = dets.clone()
    scored[0, 1, 4] += 0.002
    assert abs(error(scored)['dets'] - 0.002) < 1e-6
    assert error(new_labels=torch.tensor([[1, 0]]))['labels'] == 0.5
    assert error(new_labels=torch.tensor([[1, -1]]))['labels'] > ALONE
    assert error(dets * float('nan'))['labels'] == 1
    assert error(dets + 100)['labels'] == 1
