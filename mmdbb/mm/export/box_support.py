# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which detectors can be exported to their boxes."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmdbb.errors import UserError
from mmdbb.mm.host_internals import decodes_as_mmdet, is_rpn

#: Keys of ``test_cfg.nms`` that are followed.
NMS_KEYS = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}


def check_dense(head: nn.Module, proposes: bool) -> None:
    """Raise if the boxes of a dense head cannot be exported.

    Args:
        head: The dense head.
        proposes: Whether it proposes regions to a second stage.

    Raises:
        UserError: If it decodes in a way of its own.
    """
    name = type(head).__name__
    if not decodes_as_mmdet(head):
        raise UserError(
            f'{name} decodes its boxes in a way of its own, which cannot be '
            'exported; its raw maps can (--head, head=True)'
        )
    if head.bbox_coder.encode_size != 4:
        raise UserError(
            f'{name} encodes a box in {head.bbox_coder.encode_size} numbers, '
            'and only boxes of 4 can be exported'
        )
    if is_rpn(head) != proposes:
        raise UserError(
            f'{name} proposes regions, which are exported for two-stage '
            'detectors only'
            if is_rpn(head)
            else f'{name} proposes regions, and only an RPNHead can be '
            'exported in its place'
        )
    if getattr(head.loss_cls, 'custom_cls_channels', False):
        raise UserError(
            f'{name} has a loss with scores of its own, which cannot be '
            'exported'
        )
    _check_nms(name, head.test_cfg)


def check_roi_head(head: nn.Module) -> None:
    """Raise if the boxes of a second stage cannot be exported.

    Args:
        head: The head of regions.

    Raises:
        UserError: If it works in a way of its own.
    """
    name, bbox_head = type(head).__name__, getattr(head, 'bbox_head', None)
    if not decodes_as_mmdet(head):
        raise UserError(
            f'{name} finds its boxes in a way of its own, which cannot be '
            'exported: of two-stage detectors those with a StandardRoIHead '
            'can'
        )
    extractor = head.bbox_roi_extractor
    layers = getattr(extractor, 'roi_layers', [])
    for layer in layers:
        if getattr(layer, 'pool_mode', None) != 'avg':
            raise UserError(
                f'{name} pools regions by {type(layer).__name__}, and only '
                'RoIAlign with averages can be exported'
            )
    if bbox_head.custom_cls_channels:
        raise UserError(
            f'{name} has a loss with scores of its own, which cannot be '
            'exported'
        )
    _check_nms(name, head.test_cfg)


def _check_nms(name: str, cfg: Any) -> None:
    nms = (cfg or {}).get('nms', {})
    if nms is None:
        return
    others = sorted(set(nms) - NMS_KEYS)
    if nms.get('type', 'nms') != 'nms' or others:
        raise UserError(
            f'test_cfg of {name} asks for nms={dict(nms)}, and only type '
            f'nms with {", ".join(sorted(NMS_KEYS - {"type"}))} can be '
            'exported'
        )
    if cfg.get('max_per_img', -1) < 1:
        raise UserError(
            f'test_cfg of {name} has no max_per_img, which a file needs'
        )
