# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Compare boxes that a file finds with those that mmdet finds."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from mmdbb.mm.export.formats import FORMATS
from mmdbb.mm.export.modules import Detector

#: Name of the tensor in the file that scores of boxes must exceed.
THRESHOLD = 'score_threshold'
#: Largest share of boxes that only one of the two may find. Both compute in
#: single precision, so of two boxes that overlap by just the threshold of the
#: suppression, or of two equal scores at its end, each may leave another one.
ALONE = 0.02
#: Boxes that are further apart, as a share of the image or in their scores,
#: are not the same.
_APART = 0.01


class Boxes(NamedTuple):
    """The boxes of one image.

    Attributes:
        dets: Left, top, right, bottom and score, shape (K, 5).
        labels: Shape (K,).
    """

    dets: Tensor
    labels: Tensor


def box_errors(
    found: Tuple[Tensor, Tensor],
    expected: Tuple[Tensor, Tensor],
    size: Tuple[int, int],
) -> Dict[str, float]:
    """How far the boxes of a batch are from those expected.

    Args:
        found: ``dets`` (N, M, 5) and ``labels`` (N, M) of the file; labels
            of -1 stand for no box.
        expected: The same of mmdet.
        size: Height and width in pixels of the images.

    Returns:
        dict: ``dets``: the largest difference of a coordinate, as a share of
        the image's longer side, or of a score. ``labels``: the share of boxes
        that only one of the two found, 0 if it is no more than
        :data:`ALONE`.
    """
    largest, alone, count = 0.0, 0, 0
    for i in range(len(expected[0])):
        mine = _boxes(found[0][i], found[1][i])
        theirs = _boxes(expected[0][i], expected[1][i])
        pairs = _pairs(mine, theirs, max(size))
        largest = max([largest, *(distance for _, _, distance in pairs)])
        alone += len(mine.labels) + len(theirs.labels) - 2 * len(pairs)
        count += len(mine.labels) + len(theirs.labels)
    share = alone / count if count else 0.0
    return dict(dets=largest, labels=share if share > ALONE else 0.0)


@contextlib.contextmanager
def all_boxes(network: nn.Module) -> Iterator[None]:
    """Within the context a detector finds boxes of any score.

    Args:
        network: The detector; changed within the context.
    """
    last = getattr(network, 'roi_head', None)
    cfg = (last or Detector.dense_head(network)).test_cfg
    before = cfg.get('score_thr')
    cfg.update(score_thr=0.0)
    try:
        yield
    finally:
        cfg.pop('score_thr')
        if before is not None:
            cfg.update(score_thr=before)


@contextlib.contextmanager
def without_threshold(
    path: str,
) -> Iterator[Callable[[Tensor], Tuple[Tensor, ...]]]:
    """Run a file so that it finds boxes of any score.

    Args:
        path: Path of a file with the initializer ``score_threshold``.

    Yields:
        A function that runs the file: from images to output tensors.
    """
    import onnx

    model = onnx.load(path)
    (threshold,) = (
        each
        for each in model.graph.initializer
        if each.name.endswith(THRESHOLD)
    )
    zero = onnx.numpy_helper.from_array(
        np.zeros(1, np.float32), threshold.name
    )
    threshold.CopyFrom(zero)
    with tempfile.TemporaryDirectory(prefix='mmdbb-') as folder:
        changed = os.path.join(folder, 'all.onnx')
        onnx.save(model, changed)
        yield FORMATS['onnx'].load(changed)


def _boxes(dets: Tensor, labels: Tensor) -> Boxes:
    there = labels >= 0
    return Boxes(dets[there].double(), labels[there])


def _pairs(
    mine: Boxes, theirs: Boxes, side: int
) -> List[Tuple[int, int, float]]:
    """Boxes of both sides that are the same, the nearest first."""
    scale = mine.dets.new_tensor([side] * 4 + [1.0])
    apart = (mine.dets[:, None] - theirs.dets[None]) / scale
    distance = apart.abs().amax(-1)  # (K, L)
    distance[mine.labels[:, None] != theirs.labels[None]] = torch.inf
    # A coordinate that is no number is no neighbour.
    distance = distance.nan_to_num(torch.inf, torch.inf)
    near = (distance <= _APART).nonzero()
    order = distance[near[:, 0], near[:, 1]].argsort()
    taken_mine, taken_theirs, pairs = set(), set(), []
    for i, j in near[order].tolist():
        if i not in taken_mine and j not in taken_theirs:
            taken_mine.add(i)
            taken_theirs.add(j)
            pairs.append((i, j, distance[i, j].item()))
    return pairs
