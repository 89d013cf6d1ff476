"""Tiny networks of the three tasks, as configs and as checkpoints."""

import torch
from helpers import randomize
from mmengine.config import Config

from mmdbb.mm.deploy.load import build_model

NARROW = dict(base_channels=8, stem_channels=8)
SHALLOW = dict(
    depth=18,
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(0, 1),
    **NARROW,
)
BN = dict(type='BN')
DBB = dict(type='DBB')

CLASSIFIER = """
default_scope = 'mmpretrain'
custom_imports = dict(
    imports=['mmdbb.backbones'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[120.] * 3, std=[60.] * 3, to_rgb=True),
    backbone=dict(
        type='mmpretrain.ResNetDBB', depth=18, num_stages=2,
        strides=(1, 2), dilations=(1, 1), out_indices=(1, ),
        base_channels=8, stem_channels=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16))
"""
DETECTOR = """
default_scope = 'mmdet'
custom_imports = dict(imports=['mmdbb'], allow_failed_imports=False)
conv_cfg = dict(type='DBB')
model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[120.] * 3, std=[60.] * 3,
        pad_size_divisor=32),
    backbone=dict(
        type='ResNet', depth=18, num_stages=2, strides=(1, 2),
        dilations=(1, 1), out_indices=(0, 1), base_channels=8,
        stem_channels=8, conv_cfg=conv_cfg),
    neck=dict(
        type='FPN', in_channels=[8, 16], out_channels=8, num_outs=3,
        conv_cfg=conv_cfg),
    rpn_head=dict(
        type='RPNHead', in_channels=8, feat_channels=8,
        anchor_generator=dict(
            type='AnchorGenerator', scales=[8], ratios=[1.0],
            strides=[4, 8, 16]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder')),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7),
            out_channels=8, featmap_strides=[4, 8]),
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead', in_channels=8,
            conv_out_channels=8, fc_out_channels=8, roi_feat_size=7,
            num_classes=2, conv_cfg=conv_cfg, norm_cfg=dict(type='BN'),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'))),
    train_cfg=dict(rpn=None, rcnn=None, rpn_proposal=dict()),
    test_cfg=dict(
        rpn=dict(
            nms_pre=10, max_per_img=10, min_bbox_size=0,
            nms=dict(type='nms', iou_threshold=0.7)),
        rcnn=dict(
            score_thr=0.0, max_per_img=10,
            nms=dict(type='nms', iou_threshold=0.5))))
"""
SEGMENTOR = """
default_scope = 'mmseg'
custom_imports = dict(imports=['mmdbb'], allow_failed_imports=False)
conv_cfg = dict(type='DBB')
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[120.] * 3, std=[60.] * 3,
        size=(32, 32)),
    backbone=dict(
        type='ResNetV1c', depth=18, num_stages=2, strides=(1, 2),
        dilations=(1, 2), out_indices=(0, 1), base_channels=8,
        stem_channels=8, norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    decode_head=dict(
        type='PSPHead', in_channels=16, in_index=1, channels=8,
        num_classes=3, pool_scales=(1, 2), norm_cfg=norm_cfg,
        conv_cfg=conv_cfg, align_corners=False),
    auxiliary_head=dict(
        type='FCNHead', in_channels=8, in_index=0, channels=8, num_convs=1,
        num_classes=3, norm_cfg=norm_cfg, conv_cfg=dict(type='ACB'),
        align_corners=False),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
"""
CONFIGS = dict(classifier=CLASSIFIER, detector=DETECTOR, segmentor=SEGMENTOR)
SIZE = (64, 48)


def write_config(folder, task, name='config.py'):
    path = folder / name
    path.write_text(CONFIGS[task])
    return str(path)


def write_checkpoint(config, path, seed=0):
    """Random weights and norms, as after training."""
    model = randomize(build_model(Config.fromfile(config)), seed)
    state = model.state_dict()
    meta = dict(epoch=3, cfg='the text of another config')
    torch.save(dict(state_dict=state, meta=meta), path)
    return str(path)
