# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Non-maximum suppression with outputs of a fixed shape, in torch and in ONNX.

``torch.export`` cannot trace a network whose tensors change their length with
their content, as the boxes do that a suppression leaves. The operator here
returns a mask over all boxes instead. In ONNX it is a ``NonMaxSuppression``
whose indices are scattered into the mask.
"""

from __future__ import annotations

from typing import Any, Callable, Dict

import torch
from torch import Tensor

#: Score that a box has which takes no part; all others have at least zero.
NO_SCORE = -1.0


@torch.library.custom_op('mmdbb::kept_boxes', mutates_args=())
def kept_boxes(
    boxes: Tensor, scores: Tensor, iou_threshold: float, most: int
) -> Tensor:
    """Suppress boxes that overlap a box of a higher score.

    Args:
        boxes: Left, top, right and bottom, shape (N, K, 4).
        scores: Shape (N, K). Boxes of a negative score take no part.
        iou_threshold: Boxes that overlap by more than this are suppressed:
            intersection over union, between 0 and 1.
        most: Number of boxes that are left of an image at most.

    Returns:
        Tensor: True for the boxes that are left, shape (N, K).
    """
    from torchvision.ops import nms

    kept = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(len(boxes)):
        taken = (scores[i] >= 0).nonzero().flatten()
        left = nms(boxes[i, taken], scores[i, taken], iou_threshold)
        kept[i, taken[left[:most]]] = True
    return kept


@kept_boxes.register_fake
def _(boxes, scores, iou_threshold, most):
    return torch.empty_like(scores, dtype=torch.bool)


def _kept_boxes_onnx(boxes, scores, iou_threshold: float, most: int) -> Any:
    """The operator in ONNX; see :func:`kept_boxes`."""
    import onnx
    from onnxscript import opset18 as op

    found = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        op.Constant(value_ints=[most]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[NO_SCORE / 2]),
    )  # image, class, box
    places = op.Gather(found, op.Constant(value_ints=[0, 2]), axis=1)
    nothing = op.Expand(op.Constant(value_ints=[0]), op.Shape(scores))
    ones = op.Expand(op.Constant(value_ints=[1]), op.Shape(found, end=1))
    mask = op.ScatterND(nothing, places, ones)
    return op.Cast(mask, to=onnx.TensorProto.BOOL)


def translations() -> Dict[Callable, Callable]:
    """The operators of this module -> functions that write them in ONNX."""
    return {torch.ops.mmdbb.kept_boxes.default: _kept_boxes_onnx}
