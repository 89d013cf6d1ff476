# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A picture of what the merged network predicts on validation images."""

from __future__ import annotations

from pathlib import Path
from typing import List, Sequence

import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from torch import nn

from mmdbb.mm.engine.matching import match
from mmdbb.mm.engine.mistakes import KINDS, sides_of

# A colour for each digit, none of them near another.
COLOURS = np.array(
    [
        (230, 25, 75),
        (60, 180, 75),
        (255, 225, 25),
        (0, 130, 200),
        (245, 130, 48),
        (145, 30, 180),
        (70, 240, 240),
        (240, 50, 230),
        (210, 245, 60),
        (250, 190, 212),
    ]
)
# Boxes below this score are not drawn. ATSS' scores are low: they are the
# class's times the centerness.
SCORE = 0.2


def draw(task: str, model: nn.Module, dataset, path: Path) -> None:
    """Draw a network's predictions on images of a dataset.

    Args:
        task: ``'classification'``, ``'detection'`` or ``'segmentation'``.
        model: The network, in eval mode.
        dataset: The validation set.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figures of their own: the state of a user's pyplot stays as it is.
    figure = Figure(layout='constrained', dpi=110)
    FigureCanvasAgg(figure)
    dict(
        classification=_draw_digits,
        detection=_draw_boxes,
        segmentation=_draw_masks,
    )[task](figure, model, dataset)
    figure.savefig(path)


@torch.no_grad()
def _predictions(model, dataset, indices: Sequence[int], batch=50) -> List:
    """The data samples that the network predicts, in order."""
    samples = []
    for start in range(0, len(indices), batch):
        part = [dataset[i] for i in indices[start : start + batch]]
        samples += model.test_step(pseudo_collate(part))
    return samples


def _image(sample) -> np.ndarray:
    return mmcv.imread(sample.img_path, channel_order='rgb')


def _spread(dataset, count: int) -> List[int]:
    """Indices at even distances; data sets are often sorted by class."""
    count = min(count, len(dataset))
    return np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()


def _draw_digits(figure, model, dataset) -> None:
    """Some digits, then the mistakes among all of them."""
    columns = 10
    samples = _predictions(model, dataset, range(len(dataset)))
    wrong = [
        i
        for i, sample in enumerate(samples)
        if sample.pred_label.item() != sample.gt_label.item()
    ]
    shown = _spread(dataset, 3 * columns)
    mistakes = wrong[: 2 * columns]
    rows = -(-len(shown) // columns) + -(-len(mistakes) // columns)
    figure.set_size_inches(columns * 0.9, rows * 1.15 + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    # The mistakes start a row of their own.
    first = -(-len(shown) // columns) * columns
    places = list(range(len(shown))) + [first + i for i in range(columns * 2)]
    for place, index in zip(places, shown + mistakes):
        sample, axes = samples[index], grid.flat[place]
        axes.imshow(_image(sample), interpolation='nearest')
        predicted, truth = sample.pred_label.item(), sample.gt_label.item()
        score = sample.pred_score.max().item()
        axes.set_title(
            f'{predicted}  {score:.0%}'
            if predicted == truth
            else f'{predicted}, is {truth}',
            fontsize=9,
            color='black' if predicted == truth else 'crimson',
        )
    below = f'; below, in red: some of the {len(wrong)} mistakes'
    figure.suptitle(
        f'{len(samples)} validation digits, {len(samples) - len(wrong)} '
        f'right{below if wrong else ""}',
        fontsize=11,
    )


def _draw_boxes(figure, model, dataset) -> None:
    """Scenes with the boxes found, their digit and score."""
    from torchvision.ops import nms

    indices = _spread(dataset, 12)
    samples = _predictions(model, dataset, indices)
    rows, columns = -(-len(samples) // 4), min(4, len(samples))
    figure.set_size_inches(columns * 2.6, rows * 2.6 + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for axes, sample in zip(grid.flat, samples):
        axes.imshow(_image(sample))
        found = sample.pred_instances
        found = found[found.scores > SCORE]
        # Of the boxes in one place, which have other labels, the best.
        found = found[nms(found.bboxes, found.scores, 0.5)]
        sample.pred_instances = found
        sides = sides_of(sample, SCORE)
        matched = match(*sides)
        for box, label, score, verdict in zip(
            found.bboxes.tolist(),
            found.labels.tolist(),
            found.scores.tolist(),
            matched.verdicts,
        ):
            text, colour = f'{label}  {score:.0%}', COLOURS[label] / 255
            if verdict.kind in KINDS:
                text, colour = f'{label}, {_wrong(verdict)}', 'crimson'
            _draw_box(axes, box, text, colour)
        for place in matched.missed:
            label = int(sides.objects.labels[place])
            box = sides.objects.bboxes[place].tolist()
            _draw_box(axes, box, f'missed {label}', 'crimson', '--')
    figure.suptitle(
        f'Boxes with a score above {SCORE:.0%}; in red: wrong ones, dashed: '
        'missed',
        fontsize=11,
    )


def _wrong(verdict) -> str:
    """What is wrong with a box, beside its label."""
    if verdict.kind == 'wrong':
        return f'is {verdict.label}'
    return KINDS[verdict.kind][1]


def _draw_box(axes, box, text, colour, style='-') -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    axes.add_patch(
        Rectangle(
            (left, top),
            right - left,
            bottom - top,
            fill=False,
            linewidth=1.6,
            edgecolor=colour,
            linestyle=style,
        )
    )
    axes.text(
        left,
        max(top, 9),
        text,
        fontsize=7,
        verticalalignment='bottom',
        clip_on=True,
        bbox=dict(facecolor=colour, edgecolor='none', pad=1, alpha=0.8),
    )


def _draw_masks(figure, model, dataset) -> None:
    """Scenes beside what is there and what the network says is there."""
    from matplotlib.patches import Patch

    samples = _predictions(model, dataset, _spread(dataset, 6))
    figure.set_size_inches(9, len(samples) * 1.55 + 0.9)
    grid = figure.subplots(len(samples), 3, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for row, sample in zip(grid, samples):
        image = _image(sample)
        row[0].imshow(image)
        row[1].imshow(_overlay(image, sample.gt_sem_seg))
        row[2].imshow(_overlay(image, sample.pred_sem_seg))
    for axes, title in zip(grid[0], ('image', 'truth', 'prediction')):
        axes.set_title(title, fontsize=11)
    figure.legend(
        handles=[
            Patch(color=colour / 255, label=str(digit))
            for digit, colour in enumerate(COLOURS)
        ],
        loc='outside lower center',
        ncols=10,
        frameon=False,
    )


def _overlay(image: np.ndarray, labels) -> np.ndarray:
    """The image in grey, its digits in their colours."""
    labels = labels.data.squeeze(0).cpu().numpy()
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.6
    digits = labels < 10
    grey[digits] = COLOURS[labels[digits]]
    return grey.astype(np.uint8)
