# Faster R-CNN with FPN on COCO, 1x, with a ResNet-50-DBB backbone that starts
# as the plain ImageNet ResNet-50 that mmdet starts from.
_base_ = './resnet50_dbb_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='PlainPretrained', checkpoint='torchvision://resnet50'
        ),
    ),
)
