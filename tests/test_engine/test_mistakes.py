"""Mistakes are marked in the pictures of mmdet's and mmseg's visualizers."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData, PixelData
from mmengine.visualization import Visualizer
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from PIL import Image
from tiny_demo import tiny_checkpoint, tiny_config

from mmdbb.mm.engine import launch
from mmdbb.mm.engine.matching import Verdict, match
from mmdbb.mm.engine.mistakes import KINDS, marking_mistakes, sides_of

pytestmark = pytest.mark.usefixtures('quiet')
CLASSES = ('cat', 'dog', 'cow')
HIGH, WIDE = 120, 200
#: What is drawn for the objects: left, top, right, bottom.
CAT, DOG = (10.0, 10.0, 50.0, 60.0), (100.0, 20.0, 150.0, 80.0)


def instances(rows, labels, scores=None, own=False):
    bboxes = torch.tensor(rows).reshape(-1, 4)
    more = {} if scores is None else dict(scores=torch.tensor(scores))
    if own:
        bboxes = HorizontalBoxes(bboxes)
    return InstanceData(bboxes=bboxes, labels=torch.tensor(labels), **more)


def drawn(found, truth, tmp_path, mark=True, **options):
    """The picture that mmdet's hook would write."""
    visualizer = DetLocalVisualizer(name=f'of {tmp_path}')
    visualizer.dataset_meta = dict(classes=CLASSES)
    sample = DetDataSample(pred_instances=found)
    if truth is not None:
        sample.gt_instances = truth
    path = str(tmp_path / 'picture.png')
    image = np.full((HIGH, WIDE, 3), 90, np.uint8)
    draw = visualizer.add_datasample
    if mark:
        with marking_mistakes(visualizer):
            visualizer.add_datasample(
                'one', image, sample, out_file=path, **options
            )
        # Afterwards the visualizer is as it was.
        assert visualizer.add_datasample == draw
        assert 'add_image' not in vars(visualizer)
    else:
        draw('one', image, sample, out_file=path, **options)
    return np.array(Image.open(path))


def has_frame(picture, box, kind, left=WIDE):
    """Share of a frame's upper edge that has a kind's colour."""
    row = picture[round(box[1]), left + round(box[0]) : left + round(box[2])]
    return (row == KINDS[kind][0]).all(-1).mean()


def test_wrong_boxes_and_missed_objects(tmp_path):
    nothing = (60.0, 90.0, 90.0, 110.0)
    found = instances([CAT, nothing], [2, 0], [0.9, 0.8])
    picture = drawn(found, instances([CAT, DOG], [0, 1]), tmp_path)
    assert picture.shape[1] == 2 * WIDE and picture.shape[0] > HIGH
    assert has_frame(picture, CAT, 'wrong') > 0.9
    assert has_frame(picture, nothing, 'nothing') > 0.9
    # Dashed: about half of the edge.
    assert 0.3 < has_frame(picture, DOG, 'missed') < 0.8
    # The half with the truth stays as it was.
    plain = drawn(found, instances([CAT, DOG], [0, 1]), tmp_path, mark=False)
    assert (picture[:HIGH, :WIDE] == plain[:, :WIDE]).all()
    assert (picture[:HIGH] != plain).any()


def test_right_boxes_are_drawn_as_ever(tmp_path):
    found = instances([CAT, DOG], [0, 1], [0.9, 0.8])
    truth = instances([CAT, DOG], [0, 1])
    picture = drawn(found, truth, tmp_path)
    plain = drawn(found, truth, tmp_path, mark=False)
    assert (picture[:HIGH] == plain).all()
    legend = picture[HIGH:]
    assert (legend == KINDS['wrong'][0]).all(-1).any()
    assert (legend.reshape(-1, 3) > 200).all(-1).mean() > 0.5


def test_boxes_of_low_scores_count_nowhere(tmp_path):
    found = instances([CAT, DOG], [2, 1], [0.2, 0.8])
    truth = instances([DOG], [1])
    assert not (has_frame(drawn(found, truth, tmp_path), CAT, 'nothing') > 0)
    low = drawn(found, truth, tmp_path, pred_score_thr=0.1)
    assert has_frame(low, CAT, 'nothing') > 0.9


@pytest.mark.parametrize('truth', [None, InstanceData()])
def test_without_truth_nothing_is_marked(truth, tmp_path):
    found = instances([CAT], [0], [0.9])
    picture = drawn(found, truth, tmp_path)
    assert (picture == drawn(found, truth, tmp_path, mark=False)).all()


def test_boxes_out_of_the_image(tmp_path):
    found = instances([(-30.0, -9.0, 400.0, 500.0)], [0], [0.9])
    picture = drawn(found, instances([CAT], [0]), tmp_path)
    nothing = (picture[:HIGH] == KINDS['nothing'][0]).all(-1)
    assert nothing[:, WIDE:].any() and not nothing[:, :WIDE].any()


def test_windows_show_them(tmp_path, monkeypatch):
    shown = []
    visualizer = DetLocalVisualizer(name=f'of {tmp_path}')
    monkeypatch.setattr(
        visualizer, 'show', lambda image, **options: shown.append(image)
    )
    sample = DetDataSample(
        pred_instances=instances([CAT], [2], [0.9]),
        gt_instances=instances([CAT], [0]),
    )
    image = np.zeros((HIGH, WIDE, 3), np.uint8)
    with marking_mistakes(visualizer):
        visualizer.add_datasample('one', image, sample, show=True)
    (picture,) = shown
    assert has_frame(picture, CAT, 'wrong') > 0.9


def test_wrong_pixels(tmp_path, monkeypatch):
    visualizer = SegLocalVisualizer(name=f'of {tmp_path}')
    visualizer.dataset_meta = dict(
        classes=CLASSES, palette=[[0, 0, 90], [0, 90, 0], [90, 90, 0]]
    )
    truth = torch.zeros(1, 20, 30, dtype=torch.long)
    truth[:, :, :5] = 255  # of no class: not counted
    found = torch.zeros_like(truth)
    found[:, 4:10, 10:20] = 2
    sample = SegDataSample(
        gt_sem_seg=PixelData(data=truth), pred_sem_seg=PixelData(data=found)
    )
    pictures = []
    image = np.full((20, 30, 3), 80, np.uint8)
    monkeypatch.setattr(
        SegLocalVisualizer,
        'add_image',
        lambda self, name, picture, step: pictures.append(picture),
    )
    visualizer.add_datasample('one', image, sample, with_labels=False)
    with marking_mistakes(visualizer):
        visualizer.add_datasample('one', image, sample, with_labels=False)
    plain, picture = pictures
    assert (picture[:20, :60] == plain).all() and picture.shape[1] == 90
    wrong = (picture[:20, 60:] == KINDS['wrong'][0]).all(-1)
    expected = (found != truth) & (truth != 255)
    assert (wrong == expected[0].numpy()).all()
    # A truth of another size than the image cannot be compared.
    sample.gt_sem_seg = PixelData(data=truth[:, :10])
    with marking_mistakes(visualizer):
        visualizer.add_datasample(
            'one', image, sample, draw_gt=False, with_labels=False
        )
    assert pictures[-1].shape[:2] == (20, 30)


def test_boxes_in_a_class_of_their_own():
    found, truth = (
        instances([CAT], [0], scores, own=True) for scores in ([0.9], None)
    )
    sample = DetDataSample(pred_instances=found, gt_instances=truth)
    sides = sides_of(sample, 0.3)
    assert sides.found.bboxes.tolist() == [list(CAT)]
    assert match(*sides).verdicts == [Verdict('right', 0)]
    sample.ignored_instances = instances([DOG], [1], own=True)
    assert sides_of(sample, 0.3).ignored.tolist() == [list(DOG)]
    # Rotated boxes have five numbers.
    found.bboxes = torch.zeros(1, 5)
    assert sides_of(sample, 0.3) is None


def test_other_visualizers_draw_as_ever():
    visualizer = Visualizer(name='of this test')
    with marking_mistakes(visualizer):
        assert 'add_datasample' not in vars(visualizer)


def test_a_run_marks_them(tmp_path, monkeypatch):
    """tools/test.py --show-dir, of a detector that finds nothing."""
    cfg = tiny_config('detection', tmp_path)
    checkpoint = tiny_checkpoint(cfg, tmp_path / 'trained.pth')
    cfg.model.test_cfg.score_thr = 0.999
    arguments = Namespace(
        checkpoint=checkpoint,
        out=None,
        show=False,
        show_dir=str(tmp_path / 'drawn'),
        wait_time=0,
        interval=1,
        tta=False,
        quiet=False,
    )
    launch.test(cfg, arguments)
    paths = sorted((tmp_path / 'drawn').glob('*.jpg'))
    assert len(paths) == 4
    for path in paths:
        picture = np.array(Image.open(path)).astype(int)
        assert picture.shape[0] > 96
        near = np.abs(picture[:96] - KINDS['missed'][0]).sum(-1) < 60
        assert near[:, 96:].any() and not near[:, :96].any()


def test_the_demo_marks_them(tmp_path, monkeypatch):
    """Its own picture of boxes: wrong ones in red, missed ones dashed."""
    from matplotlib.figure import Figure
    from workshop.demo import picture

    image = tmp_path / 'scene.png'
    Image.new('RGB', (WIDE, HIGH)).save(image)
    sample = SimpleNamespace(
        img_path=str(image),
        pred_instances=instances([CAT], [2], [0.9]),
        gt_instances=instances([CAT, DOG], [0, 1]),
    )
    monkeypatch.setattr(picture, '_predictions', lambda *args: [sample])
    figure = Figure()
    picture._draw_boxes(figure, None, [0])
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ['2, is 0', 'missed 0', 'missed 1']
    assert [p.get_linestyle() for p in axes.patches] == ['-', '--', '--']
