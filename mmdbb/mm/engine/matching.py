# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which boxes of a detector are right, as COCO's evaluator counts at one IoU.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014
(https://arxiv.org/abs/1405.0312), and the code of its evaluator: boxes are
taken in the order of their scores, and each object is found once.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional

import torch
from torch import Tensor

#: Overlap from which a box is at an object.
IOU = 0.5


class Boxes(NamedTuple):
    """Some boxes.

    Attributes:
        bboxes: Left, top, right and bottom in pixels, shape (N, 4).
        labels: Classes, shape (N,).
        scores: Scores, shape (N,); None for objects.
    """

    bboxes: Tensor
    labels: Tensor
    scores: Optional[Tensor] = None


class Verdict(NamedTuple):
    """What a box is.

    Attributes:
        kind: ``'right'``; ``'wrong'``: at an object of another class;
            ``'again'``: at an object that a box with a higher score has
            found; ``'nothing'``: at no object; ``'ignored'``: at a crowd, of
            which nobody counts the objects.
        label: Class of the object; None if there is none.
    """

    kind: str
    label: Optional[int] = None


class Matched(NamedTuple):
    """Boxes and objects, compared.

    Attributes:
        verdicts: One for each box, in the order of the boxes.
        missed: Numbers of the objects that no box has found.
    """

    verdicts: List[Verdict]
    missed: List[int]


def match(
    found: Boxes,
    objects: Boxes,
    ignored: Optional[Tensor] = None,
    iou: float = IOU,
) -> Matched:
    """Compare boxes with the objects that are there.

    Args:
        found: A detector's boxes.
        objects: What is there.
        ignored: Regions of which the objects are not counted, (M, 4).
        iou: Overlap from which a box is at an object.

    Examples:
        >>> box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> one, two = torch.tensor([1]), torch.tensor([2])
        >>> match(Boxes(box, two, torch.ones(1)), Boxes(box, one))
        Matched(verdicts=[Verdict(kind='wrong', label=1)], missed=[0])
    """
    overlaps = _overlaps(found.bboxes, objects.bboxes)
    crowd = torch.zeros(len(found.bboxes), dtype=torch.bool)
    if ignored is not None and len(ignored):
        # A box lies at a crowd if most of itself does.
        crowd = (_overlaps(found.bboxes, ignored, own=True) >= iou).any(1)
    verdicts = [Verdict('nothing')] * len(found.bboxes)
    taken = torch.zeros(len(objects.bboxes), dtype=torch.bool)
    order = found.scores.argsort(descending=True, stable=True).tolist()
    # First the right ones: what they find no other box can find.
    for i in order:
        same = (objects.labels == found.labels[i]) & ~taken
        best = _best(overlaps[i], same, iou)
        if best is not None:
            taken[best] = True
            verdicts[i] = Verdict('right', int(objects.labels[best]))
    for i in order:
        if verdicts[i].kind == 'right':
            continue
        same = objects.labels == found.labels[i]
        again = _best(overlaps[i], same, iou)
        other = _best(overlaps[i], ~same, iou)
        if again is not None:
            verdicts[i] = Verdict('again', int(objects.labels[again]))
        elif crowd[i]:
            verdicts[i] = Verdict('ignored')
        elif other is not None:
            verdicts[i] = Verdict('wrong', int(objects.labels[other]))
    return Matched(verdicts, (~taken).nonzero().flatten().tolist())


def _best(overlaps: Tensor, allowed: Tensor, iou: float) -> Optional[int]:
    """The allowed object with the largest overlap, if it is large enough."""
    if not len(overlaps):
        return None
    overlaps = overlaps.where(allowed, overlaps.new_tensor(-1.0))
    largest = overlaps.max()
    # Of several with the same overlap the last, as COCO's evaluator does.
    place = int((overlaps == largest).nonzero()[-1])
    return place if largest >= iou else None


def _overlaps(first: Tensor, second: Tensor, own: bool = False) -> Tensor:
    """Intersection over union, or over the first boxes' own area."""
    first, second = first.double(), second.double()
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    area = (first[:, 2:] - first[:, :2]).clamp_min(0).prod(-1)[:, None]
    other = (second[:, 2:] - second[:, :2]).clamp_min(0).prod(-1)
    whole = area.expand_as(both) if own else area + other - both
    return both / whole.clamp_min(1e-12)
