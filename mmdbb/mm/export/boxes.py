# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A detector from images to boxes: decoded, suppressed and sorted.

mmdet decodes image by image, in tensors whose length depends on their
content. Here the same steps run on all candidates at once, and those that
mmdet would remove get a score of :data:`NO_SCORE` instead. Anchors, points
and the decoding of deltas are mmdet's own.
"""

from __future__ import annotations

from typing import (
    Any,
    Dict,
    List,
    NamedTuple,
    Optional,
    Tuple,
)

import torch
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.mm.deploy.images import data_samples
from mmdbb.mm.export.box_support import check_dense, check_roi_head
from mmdbb.mm.export.modules import Detector, is_detector
from mmdbb.mm.export.operators import NO_SCORE, kept_boxes, translations
from mmdbb.mm.export.same_boxes import box_errors


class Candidates(NamedTuple):
    """Boxes before the suppression.

    Attributes:
        boxes: Left, top, right and bottom in pixels, shape (N, K, 4).
        scores: Shape (N, K).
        groups: Numbers of the classes or levels; boxes of two groups do not
            suppress each other. Shape (N, K).
        valid: Whether a box takes part, shape (N, K).
    """

    boxes: Tensor
    scores: Tensor
    groups: Tensor
    valid: Tensor


class BoxDetector(Detector):
    """mmdet's detector: images to boxes after the suppression.

    Args:
        network: A detector of one stage whose head decodes as mmdet's base
            class does (RetinaNet, FCOS, ATSS, RTMDet, ...), or of two stages
            with an ``RPNHead`` and a ``StandardRoIHead`` (Faster R-CNN).
        example: Normalised images (N, C, H, W) of the size that the module
            takes.

    Shape:
        - Output ``dets``: left, top, right and bottom in pixels of the input,
          and the score, sorted by it, (N, max_per_img, 5)
        - Output ``labels``: (N, max_per_img); -1, where ``dets`` has zeros,
          if fewer boxes were found

    Raises:
        UserError: If the network decodes in another way.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        super().__init__(network, head=True)
        self.size = tuple(example.shape[-2:])
        self.dense = self.dense_head(network)
        self.roi_head = getattr(network, 'roi_head', None)
        last = self.dense if self.roi_head is None else self.roi_head
        check_dense(self.dense, proposes=self.roi_head is not None)
        if self.roi_head is not None:
            check_roi_head(self.roi_head)
        with torch.no_grad():
            maps = self.dense(network.extract_feat(example))
        priors = self.dense.prior_generator.grid_priors(
            [each.shape[-2:] for each in maps[0]],
            dtype=example.dtype,
            device=example.device,
        )
        for i, prior in enumerate(priors):
            self.register_buffer(f'priors_{i}', prior, persistent=False)
        # A tensor, so that it can be read and changed in the file.
        threshold = last.test_cfg.get('score_thr', 0)
        self.register_buffer(
            'score_threshold', torch.tensor([float(threshold)])
        )

    @property
    def translations(self) -> Dict[Any, Any]:
        """The suppression in ONNX."""
        return translations()

    def expected(self, images: Tensor) -> Dict[str, Tensor]:
        """The boxes that mmdet's own code finds."""
        samples = data_samples(images)
        for sample in samples:
            sample.pop('proposals')
        found = self.network.predict(images, samples, rescale=False)
        cfg = (self.roi_head or self.dense).test_cfg
        dets = images.new_zeros(len(found), cfg.max_per_img, 5)
        labels = torch.full(dets.shape[:2], -1, device=images.device)
        for i, sample in enumerate(found):
            boxes = sample.pred_instances
            count = len(boxes)
            dets[i, :count, :4] = getattr(boxes.bboxes, 'tensor', boxes.bboxes)
            dets[i, :count, 4] = boxes.scores
            labels[i, :count] = boxes.labels
        return dict(dets=dets, labels=labels)

    def errors(
        self, found: Tuple[Tensor, ...], expected: Dict[str, Tensor]
    ) -> Dict[str, float]:
        pair = expected['dets'], expected['labels']
        return box_errors(found, pair, self.size)

    def outputs(self, images: Tensor) -> Dict[str, Tensor]:
        features = self.network.extract_feat(images)
        cfg = self.dense.test_cfg
        if self.roi_head is None:
            found = self._dense_candidates(features, self.score_threshold)
        else:
            found = self._dense_candidates(features, None)
            proposals = _suppressed(found, cfg)
            found = self._refined(features, proposals)
            cfg = self.roi_head.test_cfg
        boxes, scores, labels = _suppressed(found, cfg)
        is_there = scores >= 0
        dets = torch.cat([boxes, scores[..., None]], -1)
        return dict(
            dets=torch.where(is_there[..., None], dets, 0.0),
            labels=torch.where(is_there, labels, -1),
        )

    def _dense_candidates(
        self, features: Tuple[Tensor, ...], threshold: Optional[Tensor]
    ) -> Candidates:
        """Candidates of the dense head.

        Args:
            features: The feature maps.
            threshold: Score that a candidate must exceed; None for an RPN,
                which has none, and suppresses level by level.
        """
        head, cfg = self.dense, self.dense.test_cfg
        maps = head(features)
        levels = []
        for i in range(len(maps[0])):
            scores = _scores(head, _flat(maps[0][i], head.cls_out_channels))
            classes = scores.shape[-1]
            scores = scores.flatten(1)
            count = scores.shape[1]
            if cfg.get('nms_pre', -1) > 0:
                count = min(count, cfg.nms_pre)
            scores, index = scores.topk(count)
            place = index // classes
            deltas = _taken(_flat(maps[1][i], 4), place)
            priors = getattr(self, f'priors_{i}')[place]
            valid = torch.ones_like(scores, dtype=torch.bool)
            group = torch.full_like(index, i)
            if threshold is not None:
                valid, group = scores > threshold, index % classes
            if len(maps) > 2:  # centerness, or the expected overlap
                factor = _flat(maps[2][i], 1).squeeze(-1).sigmoid()
                scores = scores * factor.gather(1, place)
            boxes = self._decoded(head.bbox_coder, priors, deltas)
            levels.append(Candidates(boxes, scores, group, valid))
        found = Candidates(*(torch.cat(parts, 1) for parts in zip(*levels)))
        return _without_small(found, cfg)

    def _refined(
        self,
        features: Tuple[Tensor, ...],
        proposals: Tuple[Tensor, Tensor, Tensor],
    ) -> Candidates:
        """Candidates of the second stage."""
        head = self.roi_head.bbox_head
        boxes, scores, _ = proposals
        count, each = scores.shape
        rois = torch.cat(
            [
                torch.arange(count, device=boxes.device)
                .to(boxes)[:, None, None]
                .expand(-1, each, 1),
                boxes,
            ],
            -1,
        ).reshape(-1, 5)
        pooled = _pooled(self.roi_head.bbox_roi_extractor, features, rois)
        if self.roi_head.with_shared_head:
            pooled = self.roi_head.shared_head(pooled)
        logits, deltas = head(pooled)
        chance = logits.softmax(-1)[:, :-1]
        classes = chance.shape[-1]
        own = 1 if head.reg_class_agnostic else classes
        refined = self._decoded(
            head.bbox_coder,
            rois[:, None, 1:].expand(-1, own, 4),
            deltas.reshape(-1, own, 4),
        ).expand(-1, classes, 4)
        chance = chance.reshape(count, each, classes)
        valid = (chance > self.score_threshold) & (scores[..., None] >= 0)
        labels = torch.arange(classes, device=rois.device)
        return Candidates(
            refined.reshape(count, each * classes, 4),
            chance.flatten(1),
            labels.expand(count, each, classes).flatten(1),
            valid.flatten(1),
        )

    def _decoded(self, coder: Any, priors: Tensor, deltas: Tensor) -> Tensor:
        """Boxes of priors and deltas (..., D) and (..., 4)."""
        boxes = coder.decode(
            priors.reshape(-1, priors.shape[-1]), deltas.reshape(-1, 4)
        )
        boxes = getattr(boxes, 'tensor', boxes)
        if getattr(coder, 'clip_border', True):
            height, width = self.size
            left, top, right, bottom = boxes.unbind(-1)
            boxes = torch.stack(
                [
                    left.clamp(0, width),
                    top.clamp(0, height),
                    right.clamp(0, width),
                    bottom.clamp(0, height),
                ],
                -1,
            )
        return boxes.reshape(deltas.shape)


def box_detector(network: nn.Module, example: Tensor) -> BoxDetector:
    """Wrap a detector as a function from images to boxes.

    Args:
        network: The network.
        example: Normalised images (N, C, H, W) of the size that it takes.

    Raises:
        UserError: If it is no detector, or its boxes cannot be exported.
    """
    if not is_detector(network):
        raise UserError(
            f'boxes are those of detectors, not of {type(network).__name__}'
        )
    return BoxDetector(network, example)


def _flat(level: Tensor, channels: int) -> Tensor:
    """A map (N, A * channels, H, W) as (N, H * W * A, channels)."""
    count = level.shape[0]
    return level.permute(0, 2, 3, 1).reshape(count, -1, channels)


def _taken(rows: Tensor, place: Tensor) -> Tensor:
    """Rows (N, K, 4) at places (N, M): (N, M, 4)."""
    return rows.gather(1, place[..., None].expand(-1, -1, rows.shape[-1]))


def _scores(head: nn.Module, logits: Tensor) -> Tensor:
    if head.use_sigmoid_cls:
        return logits.sigmoid()
    return logits.softmax(-1)[..., :-1]


def _without_small(found: Candidates, cfg: Any) -> Candidates:
    least = cfg.get('min_bbox_size', -1)
    if least < 0:
        return found
    sides = found.boxes[..., 2:] - found.boxes[..., :2]
    return found._replace(valid=found.valid & (sides > least).all(-1))


def _suppressed(found: Candidates, cfg: Any) -> Tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and groups that are left, the best first.

    Shapes (N, M, 4), (N, M) and (N, M), where M is ``max_per_img``; a score
    of :data:`NO_SCORE` stands where fewer are left.
    """
    scores = torch.where(found.valid, found.scores, NO_SCORE)
    boxes, most = found.boxes, min(cfg.max_per_img, scores.shape[1])
    if cfg.nms is not None:
        apart = boxes
        if not cfg.nms.get('class_agnostic', False):
            # mmcv's way: each group far away from the others.
            step = boxes.amax((1, 2), keepdim=True) + 1
            apart = boxes + found.groups[..., None].to(boxes) * step
        kept = kept_boxes(apart, scores, float(cfg.nms.iou_threshold), most)
        scores = torch.where(kept, scores, NO_SCORE)
    scores, index = scores.topk(most)
    return _taken(boxes, index), scores, found.groups.gather(1, index)


def _pooled(
    extractor: nn.Module, features: Tuple[Tensor, ...], rois: Tensor
) -> Tensor:
    """Features (K, C, h, w) of regions (K, 5), each from its level."""
    from torchvision.ops import roi_align

    features = features[: extractor.num_inputs]
    levels = extractor.map_roi_levels(rois, len(features))
    total: List[Tensor] = []
    for i, (layer, level) in enumerate(zip(extractor.roi_layers, features)):
        mine = levels == i
        # Regions of other levels become points, which cost nothing.
        place = torch.cat([rois[:, :1], rois[:, 1:] * mine[:, None]], -1)
        pooled = roi_align(
            level,
            place,
            layer.output_size,
            layer.spatial_scale,
            max(layer.sampling_ratio, 0),
            layer.aligned,
        )
        total.append(torch.where(mine[:, None, None, None], pooled, 0.0))
    return torch.stack(total).sum(0)
