"""Tiny detectors whose scores and boxes are spread, so that NMS matters."""

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdbb import DBB
from mmdbb.mm.deploy.images import data_samples

#: Height and width of the images, pixels.
SIZE = (64, 96)
#: End of a last layer's name -> mean and deviation that its outputs get.
LAST = dict(cls=(-1.0, 1.5), reg=(0.0, 0.3), centerness=(0.0, 1.0))
#: Distances to the four sides, in strides of the level.
DISTANCES = dict(LAST, reg=(1.5, 0.5))


@MODELS.register_module(force=True)
class TinyLevels(BaseModule):
    """Two levels of maps, of strides 8 and 16, by two blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.block = DBB(8, 8, 3, padding=1)
        self.down = DBB(8, 16, 3, stride=2, padding=1)
        self.lateral = nn.Conv2d(8, 16, 1)

    def forward(self, images):
        x = self.block(self.stem(images)).relu()
        return self.lateral(x), self.down(x).relu()


def anchors():
    return dict(
        type='AnchorGenerator',
        scales=[2],
        ratios=[0.5, 1.0],
        strides=[8, 16],
    )


def single(kind, head, **test_cfg):
    cfg = dict(
        nms_pre=40,
        min_bbox_size=0,
        score_thr=0.3,
        nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=12,
    )
    head = dict(
        num_classes=3,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        **head,
    )
    return dict(type=kind, bbox_head=head, test_cfg=dict(cfg, **test_cfg))


DETECTORS = {
    'RetinaNet': single(
        'RetinaNet', dict(type='RetinaHead', anchor_generator=anchors())
    ),
    'FCOS': single(
        'FCOS',
        dict(type='FCOSHead', norm_cfg=None, strides=[8, 16]),
        min_bbox_size=2,
    ),
    'RTMDet': single(
        'RTMDet',
        dict(
            type='RTMDetSepBNHead',
            anchor_generator=dict(
                type='MlvlPointGenerator', offset=0, strides=[8, 16]
            ),
            bbox_coder=dict(type='DistancePointBBoxCoder'),
            with_objectness=False,
            exp_on_reg=False,
            pred_kernel_size=1,
            norm_cfg=dict(type='BN'),
        ),
        nms=dict(type='nms', iou_threshold=0.6, class_agnostic=True),
    ),
    'FasterRCNN': dict(
        type='FasterRCNN',
        rpn_head=dict(
            type='RPNHead',
            in_channels=16,
            feat_channels=16,
            anchor_generator=anchors(),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=3),
                out_channels=16,
                featmap_strides=[8, 16],
                finest_scale=10,
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=16,
                fc_out_channels=16,
                roi_feat_size=3,
                num_classes=3,
            ),
        ),
        test_cfg=dict(
            rpn=dict(
                nms_pre=40,
                max_per_img=20,
                min_bbox_size=1,
                nms=dict(type='nms', iou_threshold=0.6),
            ),
            rcnn=dict(
                score_thr=0.2,
                max_per_img=12,
                nms=dict(type='nms', iou_threshold=0.5),
            ),
        ),
    ),
}


def detector(name, **changes):
    """A detector in eval mode, its scores and boxes spread."""
    init_default_scope('mmdet')
    cfg = ConfigDict(
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[120.0] * 3,
            std=[60.0] * 3,
            pad_size_divisor=16,
        ),
        backbone=dict(type='TinyLevels'),
        neck=dict(type='ChannelMapper', **NECK),
        train_cfg=None,
        **DETECTORS[name],
    )
    if name == 'FasterRCNN':
        cfg.train_cfg = dict(rpn=None, rcnn=None, rpn_proposal=dict())
    for key, value in changes.items():
        target = cfg
        *path, last = key.split('__')
        for part in path:
            target = target[part]
        target[last] = value
    model = MODELS.build(cfg).eval()
    points = name in ('FCOS', 'RTMDet')
    spread(model, DISTANCES if points else LAST)
    return model


#: A neck is needed by some constructors: this one has a convolution a level.
NECK = dict(
    in_channels=[16, 16],
    out_channels=16,
    kernel_size=1,
    act_cfg=None,
    num_outs=2,
)


def spread(model, moments):
    """Scale the last layers so that their outputs have these moments."""
    done = set()

    def hook(module, inputs, output, mean, std):
        if module not in done:
            done.add(module)
            factor = std / output.std()
            shift = mean - output.mean() * factor
            module.weight.data *= factor
            module.bias.data = module.bias.data * factor + shift
            return output * factor + shift
        return None

    handles = []
    for name, module in model.named_modules():
        parts = [p for p in name.split('.') if not p.isdecimal()]
        kind = parts[-1].rpartition('_')[2] if parts else ''
        if kind in moments and hasattr(module, 'bias') and 'head' in name:
            mean, std = moments[kind]
            handles.append(
                module.register_forward_hook(
                    lambda m, i, o, mean=mean, std=std: hook(
                        m, i, o, mean, std
                    )
                )
            )
    host_boxes(model, images(4))
    for handle in handles:
        handle.remove()
    assert done


def images(count=2, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=generator)


@torch.no_grad()
def host_boxes(model, batch):
    """What mmdet finds, image by image."""
    samples = data_samples(batch)
    for sample in samples:
        del sample.proposals
    return [
        sample.pred_instances
        for sample in model.predict(batch, samples, rescale=False)
    ]
