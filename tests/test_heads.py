"""mmdet's heads, shared over five levels, against the literal sum.

All forward passes come before the one backward pass, as in training.
"""

import copy

import pytest
import torch
from helpers import assert_same, blocks_of, image, randomize, state, tensors
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData

from mmdbb.reparam import literal_forward

pytestmark = pytest.mark.usefixtures('quiet')

STRIDES = (8, 16, 32, 64, 128)
IMAGE = (128, 384)
ANCHORS = dict(
    type='AnchorGenerator',
    octave_base_scale=4,
    scales_per_octave=1,
    ratios=[1.0],
    strides=STRIDES,
)
HEADS = dict(
    RetinaHead=dict(
        anchor_generator=ANCHORS,
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.4,
                min_pos_iou=0,
            ),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
        ),
    ),
    ATSSHead=dict(
        anchor_generator=ANCHORS,
        loss_bbox=dict(type='GIoULoss'),
        train_cfg=dict(
            assigner=dict(type='ATSSAssigner', topk=9),
            allowed_border=-1,
            pos_weight=-1,
        ),
    ),
    FCOSHead=dict(strides=STRIDES),
)
#: Channels too: by default RetinaHead has no norm, the others 32 groups.
NORMS = dict(BN=(8, dict(norm_cfg=dict(type='BN'))), default=(32, {}))


def build(name, conv_cfg, norm):
    channels, norm_cfg = NORMS[norm]
    config = dict(
        type=name,
        num_classes=3,
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=2,
        conv_cfg=dict(type=conv_cfg),
        **norm_cfg,
        **HEADS[name],
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        head = MODELS.build(config)
        head.init_weights()
    return randomize(head.double()).train()


def levels(channels):
    """Features such as a neck gives, brighter from level to level."""
    high, wide = IMAGE
    return [
        (i + 1) * image(2, channels, high // s, wide // s, seed=i)
        for i, s in enumerate(STRIDES)
    ]


def objects(shift):
    """Objects of several sizes, of one image."""
    boxes = [[4.0, 6, 40, 38], [50, 20, 120, 90], [8, 4, 380, 120]]
    return InstanceData(
        bboxes=torch.tensor(boxes) + shift, labels=torch.arange(3)
    )


def trained(head):
    """Gradients and buffers after a step of the head's own losses.

    Its loss of boxes is of some levels only, so a sum of all outputs is added.
    """
    xs = [x.requires_grad_() for x in levels(head.in_channels)]
    outputs = head(xs)
    metas = [dict(img_shape=IMAGE, pad_shape=IMAGE)] * 2
    losses = head.loss_by_feat(*outputs, [objects(0), objects(3)], metas)
    losses = {name: sum(tensors(loss)) for name, loss in losses.items()}
    outputs = tensors(outputs)
    weighted = [
        (y * image(*y.shape, seed=i, dtype=y.dtype)).mean()
        for i, y in enumerate(outputs)
    ]
    (sum(losses.values()) + sum(weighted)).backward()
    inputs = {f'grad input {i}': x.grad for i, x in enumerate(xs)}
    return dict(state(head, *outputs), **inputs, **losses)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('conv_cfg', ['DBB', 'OREPA'])
@pytest.mark.parametrize('name', HEADS)
def test_head_is_the_literal_sum(name, conv_cfg, norm):
    head = build(name, conv_cfg, norm)
    assert len(blocks_of(head)) == 4
    literal = copy.deepcopy(head)
    with literal_forward(literal):
        expected = trained(literal)
    for key, value in expected.items():
        assert value.isfinite().all() and value.any(), key
    assert_same(trained(head), expected)
