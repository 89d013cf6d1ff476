# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Draw a prediction, by the visualizers of OpenMMLab's packages."""

from __future__ import annotations

import uuid
from typing import List

import mmcv
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from mmengine.structures import BaseDataElement

from mmdbb.errors import UserError

#: Default scope -> the package's visualizer.
KINDS = dict(
    mmpretrain='UniversalVisualizer',
    mmdet='DetLocalVisualizer',
    mmseg='SegLocalVisualizer',
)
ENDINGS = ('.png', '.jpg', '.jpeg')


def check_ending(path: str) -> None:
    """Raise if a picture cannot be written under a name.

    Args:
        path: The path.
    """
    if not path.lower().endswith(ENDINGS):
        raise UserError(
            f'the picture must end in {" or ".join(ENDINGS)}, got {path}'
        )


def draw(
    sample: BaseDataElement,
    image: str,
    out: str,
    cfg: Config,
    min_score: float,
) -> None:
    """Draw a prediction on its image.

    Args:
        sample: The prediction, with ``classes`` and ``palette``.
        image: Path of the image.
        out: Path of the picture to write.
        cfg: The config, whose ``default_scope`` chooses the visualizer.
        min_score: Boxes of a lower score are not drawn.

    Raises:
        UserError: If no visualizer for the package is known.
    """
    kind = KINDS.get(cfg.get('default_scope'))
    if kind is None:
        raise UserError(
            f'no picture is drawn for default_scope='
            f'{cfg.get("default_scope")!r}; allowed: {", ".join(KINDS)}'
        )
    # A name of its own: mmengine keeps visualizers by name.
    visualizer = VISUALIZERS.build(dict(type=kind, name=uuid.uuid4().hex))
    visualizer.dataset_meta = dict(
        classes=sample.metainfo.get('classes'),
        palette=sample.metainfo.get('palette'),
    )
    pixels = mmcv.imread(image, channel_order='rgb')
    if kind == 'UniversalVisualizer':
        visualizer.visualize_cls(
            pixels, sample, draw_gt=False, out_file=out, rescale_factor=None
        )
        return
    options = dict(pred_score_thr=min_score) if kind == KINDS['mmdet'] else {}
    visualizer.add_datasample(
        'prediction', pixels, sample, draw_gt=False, out_file=out, **options
    )


def described(sample: BaseDataElement, min_score: float) -> List[str]:
    """A prediction in words, a line for each thing found.

    Args:
        sample: The prediction, with ``classes``.
        min_score: Boxes of a lower score are left out.
    """
    classes = sample.metainfo.get('classes')

    def name(label: int) -> str:
        if classes is None or not 0 <= label < len(classes):
            return str(label)
        return classes[label]

    if 'pred_score' in sample:
        scores = sample.pred_score
        order = scores.argsort(descending=True)[:5].tolist()
        return [f'{name(i)}  {scores[i]:.3f}' for i in order]
    if 'pred_instances' in sample:
        found = sample.pred_instances
        found = found[found.scores >= min_score]
        lines = [
            f'{name(label)}  {score:.3f}  '
            + ' '.join(f'{value:.1f}' for value in box)
            for label, score, box in zip(
                found.labels.tolist(),
                found.scores.tolist(),
                found.bboxes.tolist(),
            )
        ]
        return lines or [f'no box of a score from {min_score:g} on']
    labels = sample.pred_sem_seg.data.flatten()
    values, counts = labels.unique(return_counts=True)
    return [
        f'{name(value)}  {count / labels.numel():.1%} of the pixels'
        for value, count in zip(values.tolist(), counts.tolist())
    ]
