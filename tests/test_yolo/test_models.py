"""ultralytics' models with blocks: merged and fused, they compute the same."""

import copy
import io

import pytest
import torch
from helpers import EXACT, distance, randomize
from torch.utils._pytree import tree_flatten

import mmdbb
from mmdbb.reparam import find_blocks, literal_forward

tasks = pytest.importorskip('ultralytics.nn.tasks')

MODELS = [
    'yolov3-tiny',
    'yolov5n',
    'yolov6n',
    'yolov8n',
    'yolov8n-seg',
    'yolov8n-pose',
    'yolov8n-ghost',
    'yolov9t',  # RepConv, whose fusing takes it that no bias is
    'yolov10n',  # RepVGGDW
    'yolo11n',
    'yolo12n',
    'yolo26n',
    'rtdetr-l',
]
CLASSES = {
    'rtdetr-l': 'RTDETRDetectionModel',
    'yolov8n-seg': 'SegmentationModel',
    'yolov8n-pose': 'PoseModel',
}


def build(name):
    kind = getattr(tasks, CLASSES.get(name, 'DetectionModel'))
    return kind(f'{name}.yaml', nc=4, verbose=False)


def floats(outputs):
    found = [t for t in tree_flatten(outputs)[0] if torch.is_tensor(t)]
    return [t for t in found if t.is_floating_point()]


@pytest.mark.parametrize('block', ['DBB', 'OREPA'])
@pytest.mark.parametrize('name', MODELS)
def test_merged_and_fused_they_compute_the_same(name, block):
    model = build(name)
    names = list(model.state_dict())
    inserted = mmdbb.insert_blocks_(
        model, dict(type=block), example=torch.rand(1, 3, 64, 64)
    )
    assert len(inserted) > 10
    randomize_gently(model)
    model.double().eval()
    x = torch.rand(2, 3, 64, 96).double()
    with torch.no_grad(), literal_forward(model):
        expected = floats(model(x))
    merged = copy.deepcopy(model)
    mmdbb.merge_back_(merged)
    assert list(merged.state_dict()) == names
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    fused = torch.load(saved, weights_only=False).fuse(verbose=False)
    assert fused.is_fused()
    for other in (merged, fused):
        assert not find_blocks(other)
        with torch.no_grad():
            found = floats(other(x))
        # Fusing drops the second of two heads, whose outputs come last.
        for value, wanted in zip(found, expected):
            if value.shape == wanted.shape:
                assert distance(value, wanted) < EXACT
        assert found[0].shape == expected[0].shape


def randomize_gently(model):
    """Random norms with which the outputs of a deep network stay small."""
    randomize(model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.mul_(0.5)
