"""How far a figure fell: shares, points, errors, and what nobody knows."""

import math
import struct

import pytest

from mmdbb.errors import UserError
from mmdbb.mm.evaluation.metric import Figure, Metric, describe_fall, fall


def fell(name, first, last, **known):
    """How far a figure fell, as tools/quantize.py compares it."""
    metric = Metric(**known).of(name, first)
    return fall(Figure(metric, first), Figure(metric, last))


@pytest.mark.parametrize(
    'name, first, last, expected',
    [
        ('accuracy/top1', 97.5, 95.0, 2.5),
        ('accuracy/top1', 95.0, 97.5, -2.5),
        ('mIoU', 70.0, 69.5, 0.5),
        ('coco/bbox_mAP', 0.5, 0.2, 30.0),
        # Another evaluator of the same name, which prints shares.
        ('mIoU', 0.7, 0.69, 1.0),
        # A collapse to less than a per cent is no share.
        ('mIoU', 70.0, 0.9, 69.1),
    ],
)
def test_known_figures_are_compared_in_points(name, first, last, expected):
    assert fell(name, first, last) == pytest.approx(expected)


@pytest.mark.parametrize(
    'name, first, last',
    [
        ('val/bbox_mAP', 0.5, 0.2),  # CocoMetric(prefix='val')
        ('openimages/mAP', 0.5, 0.2),
        ('lvis/bbox_AP', 0.5, 0.2),
        ('lvis_fixed_ap/AP', 0.5, 0.2),
        ('dod/full', 0.5, 0.2),
        ('crowd_human/AP', 0.8, 0.6),
        ('d1', 0.9, 0.3),  # mmseg's DepthMetric
        ('multi-label/mAP', 60.0, 50.0),
        # Less is better.
        ('crowd_human/mMR', 0.5, 0.9),
        ('rmse', 3.0, 9.0),
        ('abs_rel', 0.05, 0.058),
        ('mae', 60.0, 75.0),  # crowd counting
        ('loss', 0.0, 0.1),
    ],
)
def test_a_collapse_of_an_unknown_figure_passes_no_guard(name, first, last):
    drop = fell(name, first, last)
    assert drop > 10
    # Never less than what it is, whatever unit it turns out to have.
    for unit in ('share', 'points'):
        for lower in (True, False):
            known = dict(unit=unit, lower_is_better=lower)
            if first <= 1 or unit == 'points':
                assert drop >= fell(name, first, last, **known) - 1e-9


def test_what_is_said_counts():
    share = dict(unit='share', lower_is_better=False)
    assert fell('val/mAP', 0.5, 0.495, **share) == pytest.approx(0.5)
    assert fell('val/mAP', 0.5, 0.6, **share) == pytest.approx(-10)
    error = dict(lower_is_better=True)
    assert fell('rmse', 3.0, 3.3, **error) == pytest.approx(10)
    assert fell('rmse', 3.0, 2.7, **error) == pytest.approx(-10)
    points = dict(unit='points', lower_is_better=True)
    assert fell('err', 3.0, 3.3, **points) == pytest.approx(0.3)
    # It overrules what the name tells.
    assert fell('mIoU', 0.7, 0.6, unit='points') == pytest.approx(0.1)
    assert fell('mIoU', 70.0, 60.0, lower_is_better=True) == -10
    with pytest.raises(UserError, match="share, points; got 'percent'"):
        Metric(unit='percent').check()


def test_single_precision_is_no_fall():
    """An evaluator's 93.3 is 93.30000305, and lost 0.3 points at 93."""
    single = struct.unpack('f', struct.pack('f', 93.3))[0]
    assert single - 93 > 0.3
    assert fell('accuracy/top1', single, 93.0) == 0.3


def test_edges():
    assert fell('rmse', 0.0, 0.0) == 0
    assert fell('rmse', 0.0, 1e-9) == math.inf
    assert math.isnan(fell('mIoU', math.nan, 70.0))
    assert math.isnan(fell('mIoU', 70.0, math.nan))
    assert fell('psnr', -2.0, -1.0) == 50


def test_the_message_says_the_direction_and_what_is_not_known():
    def said(name, first, last, **known):
        metric = Metric(**known).of(name, first)
        return describe_fall(Figure(metric, first), Figure(metric, last))

    assert said('mIoU', 70.0, 60.0) == (
        'mIoU falls by 10.00 points, from 70 to 60'
    )
    error = said('rmse', 3.0, 9.0, lower_is_better=True)
    assert error.startswith('rmse rises by 200.00 per cent of its value, from')
    assert error.endswith('(nothing says its unit (--unit share or points))')
    unknown = said('val/mAP', 0.5, 0.2)
    assert unknown.startswith('val/mAP changes by 60.00 per cent of its value')
    assert '--unit' in unknown and '--lower-is-better' in unknown


def test_a_table_gives_the_unit_if_it_is_known():
    figure = Figure(Metric().of('coco/bbox_mAP', 0.5), 0.5)
    assert (figure.title, figure.points) == ('coco/bbox_mAP (points)', 50)
    figure = Figure(Metric().of('rmse', 3.0), 3.0)
    assert (figure.title, figure.points) == ('rmse (unit unknown)', 3)
