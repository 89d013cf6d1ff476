"""Which boxes are right: by hand, and as COCO's evaluator counts them."""

import contextlib
import io

import numpy as np
import pytest
import torch

from mmdbb.mm.engine.matching import Boxes, Matched, Verdict, match


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def found(rows, labels, scores=None):
    scores = (
        torch.linspace(0.9, 0.1, len(labels))
        if scores is None
        else (torch.tensor(scores))
    )
    return Boxes(boxes(*rows), torch.tensor(labels), scores)


def objects(rows, labels):
    return Boxes(boxes(*rows), torch.tensor(labels))


ONE, TWO = (0, 0, 10, 10), (20, 20, 40, 30)


def test_each_kind():
    matched = match(
        found(
            [ONE, ONE, TWO, (50, 50, 60, 60), (0, 0, 10, 21)],
            [1, 1, 3, 1, 1],
        ),
        objects([ONE, TWO], [1, 2]),
    )
    assert matched.verdicts == [
        Verdict('right', 1),
        Verdict('again', 1),
        Verdict('wrong', 2),
        Verdict('nothing'),
        Verdict('nothing'),  # overlap 10 / 21, just below one half
    ]
    assert matched.missed == [1]


def test_the_score_decides_not_the_place():
    rows = [(0, 0, 10, 9), ONE]
    matched = match(found(rows, [1, 1], [0.3, 0.8]), objects([ONE], [1]))
    assert [v.kind for v in matched.verdicts] == ['again', 'right']


def test_a_right_box_leaves_other_objects_to_others():
    """Two objects that overlap; each box takes its best one left."""
    near = (2, 0, 12, 10)
    matched = match(found([ONE, ONE], [1, 1]), objects([ONE, near], [1, 1]))
    assert [v.kind for v in matched.verdicts] == ['right', 'right']
    assert matched.missed == []


def test_half_is_enough():
    half = found([(0, 0, 10, 5)], [1])
    assert match(half, objects([ONE], [1])).verdicts[0].kind == 'right'


def test_crowds_are_ignored():
    matched = match(
        found([(100, 100, 110, 110), ONE], [1, 1]),
        objects([], []),
        boxes((90, 90, 200, 200)),
    )
    assert [v.kind for v in matched.verdicts] == ['ignored', 'nothing']


def test_nothing_at_all():
    none = Boxes(boxes(), torch.zeros(0).long(), torch.zeros(0))
    assert match(none, objects([], [])) == Matched([], [])
    assert match(none, objects([ONE], [1])) == Matched([], [0])
    assert match(found([ONE], [1]), objects([], [])).verdicts == [
        Verdict('nothing')
    ]


@pytest.mark.parametrize('seed', range(6))
def test_right_boxes_are_those_of_coco(seed):
    """pycocotools' matches at IoU 0.5, on random boxes of three classes."""
    coco = pytest.importorskip('pycocotools.coco')
    from pycocotools.cocoeval import COCOeval

    generator = torch.Generator().manual_seed(seed)

    def some(count):
        corner = torch.randint(0, 16, (count, 2), generator=generator)
        size = torch.randint(8, 24, (count, 2), generator=generator)
        rows = torch.cat([corner, corner + size], 1).float()
        return rows, torch.randint(0, 3, (count,), generator=generator)

    truth, labels = some(12)
    rows, guessed = some(30)
    scores = torch.rand(30, generator=generator)
    matched = match(Boxes(rows, guessed, scores), Boxes(truth, labels))

    def described(rows, labels, **more):
        for i, (row, label) in enumerate(zip(rows.tolist(), labels.tolist())):
            left, top, right, bottom = row
            size = [right - left, bottom - top]
            yield dict(
                id=i + 1,
                image_id=1,
                category_id=label + 1,
                bbox=[left, top, *size],
                area=size[0] * size[1],
                iscrowd=0,
                **{k: v[i] for k, v in more.items()},
            )

    with contextlib.redirect_stdout(io.StringIO()):
        data = coco.COCO()
        data.dataset = dict(
            images=[dict(id=1)],
            categories=[dict(id=i) for i in (1, 2, 3)],
            annotations=list(described(truth, labels)),
        )
        data.createIndex()
        guesses = data.loadRes(
            list(described(rows, guessed, score=scores.tolist()))
        )
        evaluated = COCOeval(data, guesses, 'bbox')
        evaluated.params.iouThrs = np.array([0.5])
        evaluated.evaluate()
    right = {
        guess - 1
        for image in evaluated.evalImgs
        if image and image['aRng'] == evaluated.params.areaRng[0]
        for guess, taken in zip(image['dtIds'], image['dtMatches'][0])
        if taken
    }
    own = {i for i, v in enumerate(matched.verdicts) if v.kind == 'right'}
    assert own == right and right
    assert len(matched.missed) == 12 - len(right)
