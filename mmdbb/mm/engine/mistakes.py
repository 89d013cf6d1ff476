# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Mark mistakes in the pictures that mmdet and mmseg draw in a test.

The packages draw what is there beside what was predicted, and leave it to the
reader to find the differences. Here each wrong box gets a frame that says what
is wrong, each object that was missed a dashed one, and wrong pixels are red.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import mmcv
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmdbb.mm.engine.matching import IOU, Boxes, Matched, match
from mmdbb.mm.host_internals import replaced

Colour = Tuple[int, int, int]
#: Kind of a mistake -> its colour, and what the legend says.
KINDS = {
    'wrong': ((214, 39, 40), 'another class'),
    'nothing': ((255, 127, 14), 'nothing there'),
    'again': ((148, 103, 189), 'found already'),
    'missed': ((227, 26, 163), 'missed'),
}
_GROUND, _INK = (250, 250, 250), (30, 30, 30)


@contextlib.contextmanager
def marking_mistakes(visualizer: Any) -> Iterator[None]:
    """Within the context, a visualizer's pictures have mistakes marked.

    Those of mmdet's and mmseg's visualizers for boxes and segments are; other
    visualizers draw as ever, and so do these for a sample without truth.

    Args:
        visualizer: The runner's visualizer.
    """
    kinds = {kind.__name__ for kind in type(visualizer).__mro__}
    mark: Optional[Callable] = None
    if 'DetLocalVisualizer' in kinds:
        mark = _boxes_marked
    elif 'SegLocalVisualizer' in kinds:
        mark = _pixels_marked
    if mark is None:
        yield
        return
    draw = visualizer.add_datasample
    drawing = functools.partial(_draw, visualizer, draw, mark)
    with replaced(visualizer, 'add_datasample', drawing):
        yield


def _draw(
    visualizer: Any,
    draw: Callable,
    mark: Callable,
    name: str,
    image: np.ndarray,
    data_sample: Any = None,
    **options: Any,
) -> None:
    """Draw as the package does, mark the mistakes, and show or write it."""
    drawn: List[np.ndarray] = []

    def catch(name: str, picture: np.ndarray, step: int = 0) -> None:
        drawn.append(picture)

    ways = {k: options.pop(k, None) for k in ('show', 'out_file')}
    with replaced(visualizer, 'add_image', catch):
        draw(name, image, data_sample, **options)
    if not drawn:  # not the process that draws
        return
    classes = visualizer.dataset_meta.get('classes')
    sample = data_sample.cpu() if data_sample is not None else None
    score = options.get('pred_score_thr', 0.3)
    picture = mark(drawn[0], image, sample, classes, score)
    if ways['show']:
        wait_time = options.get('wait_time', 0)
        visualizer.show(picture, win_name=name, wait_time=wait_time)
    if ways['out_file'] is not None:
        mmcv.imwrite(picture[..., ::-1], ways['out_file'])
    else:
        visualizer.add_image(name, picture, options.get('step', 0))


class Sides(NamedTuple):
    """Boxes that a picture shows, and the objects that are there."""

    found: Boxes
    objects: Boxes
    ignored: Optional[Tensor]


def sides_of(sample: Any, score: float) -> Optional[Sides]:
    """Read the boxes of a data sample of mmdet's.

    Args:
        sample: The data sample, with predictions and truth.
        score: Boxes with this score or less are not drawn.

    Returns:
        Sides: Boxes and objects; None if the sample has no truth, or boxes
        that are not upright rectangles.
    """
    truth = getattr(sample, 'gt_instances', None)
    found = getattr(sample, 'pred_instances', None)
    if truth is None or found is None:
        return None
    if 'bboxes' not in truth or 'bboxes' not in found:
        return None
    found = found[found.scores > score]
    ignored = getattr(sample, 'ignored_instances', None)
    regions = None
    if ignored is not None and 'bboxes' in ignored:
        regions = _plain(ignored.bboxes)
    sides = Sides(
        Boxes(_plain(found.bboxes), found.labels, found.scores),
        Boxes(_plain(truth.bboxes), truth.labels),
        regions,
    )
    boxes = (sides.found.bboxes, sides.objects.bboxes)
    return sides if all(b.shape[-1] == 4 for b in boxes) else None


def _plain(bboxes: Any) -> Tensor:
    """The numbers of boxes, which mmdet may keep in a class of its own."""
    return getattr(bboxes, 'tensor', bboxes)


def _boxes_marked(
    drawn: np.ndarray,
    image: np.ndarray,
    sample: Any,
    classes: Optional[tuple],
    score: float,
) -> np.ndarray:
    sides = sides_of(sample, score)
    if sides is None:
        return drawn
    matched = match(*sides)
    picture = Image.fromarray(np.ascontiguousarray(drawn))
    pen = _Pen(picture, drawn.shape[1] - image.shape[1], image.shape[:2])
    for place in matched.missed:
        box = sides.objects.bboxes[place].tolist()
        name = _name(int(sides.objects.labels[place]), classes)
        pen.frame(box, KINDS['missed'][0], f'missed {name}', dashed=True)
    for box, verdict in zip(sides.found.bboxes.tolist(), matched.verdicts):
        if verdict.kind in KINDS:
            text = KINDS[verdict.kind][1]
            if verdict.kind == 'wrong':
                text = f'is {_name(verdict.label, classes)}'
            pen.frame(box, KINDS[verdict.kind][0], text)
    return _with_legend(picture, _legend(matched), pen.font)


def _name(label: Optional[int], classes: Optional[tuple]) -> str:
    if classes is None or label is None or label >= len(classes):
        return str(label)
    return str(classes[label])


def _legend(matched: Matched) -> List[Tuple[Optional[Colour], str]]:
    """Colours, and what they mean."""
    counts = Counter(verdict.kind for verdict in matched.verdicts)
    counts['missed'] = len(matched.missed)
    right = f'{counts["right"]} right at IoU {IOU:g}'
    return [(None, right)] + [
        (colour, f'{counts[kind]} {text}')
        for kind, (colour, text) in KINDS.items()
    ]


def _pixels_marked(
    drawn: np.ndarray,
    image: np.ndarray,
    sample: Any,
    classes: Optional[tuple],
    score: float,
) -> np.ndarray:
    truth = getattr(sample, 'gt_sem_seg', None)
    found = getattr(sample, 'pred_sem_seg', None)
    if truth is None or found is None:
        return drawn
    truth, found = (
        np.asarray(each.data.squeeze(0)) for each in (truth, found)
    )
    if truth.shape != found.shape or truth.shape != image.shape[:2]:
        return drawn
    # Labels that are no class, such as 255, are not counted.
    known = truth < (len(classes) if classes else 255)
    wrong = known & (truth != found)
    grey = image.mean(2, keepdims=True).repeat(3, 2) * 0.5 + 110
    grey[~known] = 255
    grey[wrong] = KINDS['wrong'][0]
    whole = np.concatenate([drawn, grey.astype(np.uint8)], 1)
    share = wrong.sum() / max(known.sum(), 1)
    legend = [(KINDS['wrong'][0], f'{100 * share:.1f} % of the pixels wrong')]
    if not known.all():
        legend.append(((255, 255, 255), 'not counted'))
    return _with_legend(Image.fromarray(whole), legend, _font(image.shape[:2]))


class _Pen:
    """Draws frames with a label into a picture.

    Args:
        picture: The picture, changed in place.
        left: Pixels from the left where the image begins in it.
        size: Height and width of the image.
    """

    def __init__(
        self, picture: Image.Image, left: int, size: Tuple[int, int]
    ) -> None:
        self._draw = ImageDraw.Draw(picture)
        self._left, self._size = left, size
        self._width = max(2, round(min(size) / 240))
        self.font = _font(size)

    def frame(
        self,
        box: List[float],
        colour: Colour,
        text: str,
        dashed: bool = False,
    ) -> None:
        """Draw a frame around a box, and what is wrong at its end.

        A dashed one is labelled above, so that a box at a missed object can
        be labelled below.
        """
        high, wide = self._size
        ends = (wide - 1, high - 1, wide - 1, high - 1)
        left, top, right, bottom = (
            min(max(round(value), 0), end) for value, end in zip(box, ends)
        )
        left, right = left + self._left, max(right, left) + self._left
        bottom = max(bottom, top)
        for line in (
            (left, top, right, top),
            (left, bottom, right, bottom),
            (left, top, left, bottom),
            (right, top, right, bottom),
        ):
            self._line(line, colour, dashed)
        high = self._draw.textbbox((0, 0), text, font=self.font)[3]
        place = top - high - 4 if dashed else bottom
        self._tag(left, place, text, colour)

    def _line(
        self, line: Tuple[int, ...], colour: Colour, dashed: bool
    ) -> None:
        start, end = np.array(line[:2]), np.array(line[2:])
        length = max(int(np.abs(end - start).max()), 1)
        dash = 4 * self._width if dashed else length + 1
        for at in range(0, length + 1, 2 * dash):
            to = min(at + dash, length)
            points = [
                tuple(np.round(start + (end - start) * t / length).tolist())
                for t in (at, to)
            ]
            self._draw.line(points, fill=colour, width=self._width)

    def _tag(self, left: int, top: int, text: str, colour: Colour) -> None:
        wide, high = self._draw.textbbox((0, 0), text, font=self.font)[2:]
        left = max(
            min(left, self._left + self._size[1] - wide - 4), self._left
        )
        top = max(min(top, self._size[0] - high - 3), 0)
        place = (left, top, left + wide + 4, top + high + 3)
        self._draw.rectangle(place, fill=colour)
        self._draw.text(
            (left + 2, top + 1), text, fill=_ink(colour), font=self.font
        )


def _font(size: Tuple[int, int]) -> Any:
    return ImageFont.load_default(size=max(9, min(size) // 32))


def _ink(colour: Colour) -> Colour:
    """White or black, whichever can be read on a colour."""
    red, green, blue = colour
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    return _INK if bright > 140 else (255, 255, 255)


def _with_legend(
    picture: Image.Image,
    legend: List[Tuple[Optional[Colour], str]],
    font: Any,
) -> np.ndarray:
    """The picture with its legend below, in as many lines as it needs."""
    ruler = ImageDraw.Draw(picture)
    gap = max(4, int(ruler.textlength('x', font=font)))
    high = ruler.textbbox((0, 0), 'Xg', font=font)[3] + gap
    places, x, y = [], gap, 0
    for colour, text in legend:
        wide = round(ruler.textlength(text, font=font)) + 3 * gap
        if x > gap and x + wide > picture.width:
            x, y = gap, y + high
        places.append((x, y, colour, text))
        x += wide + gap
    whole = Image.new(
        'RGB', (picture.width, picture.height + y + high + gap), _GROUND
    )
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for x, y, colour, text in places:
        top = picture.height + gap // 2 + y
        if colour is not None:
            box = (x, top + gap // 2, x + gap, top + high - gap)
            draw.rectangle(box, fill=colour, outline=_INK)
        left = x + (2 * gap if colour is not None else 0)
        draw.text((left, top), text, fill=_INK, font=font)
    return np.asarray(whole)
