# CenterNet on COCO with a ResNet-18-DBB backbone that starts as the plain
# ImageNet ResNet-18 that mmdet starts from.
_base_ = './resnet18_dbb_centernet_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='PlainPretrained', checkpoint='torchvision://resnet18'
        ),
    ),
)
