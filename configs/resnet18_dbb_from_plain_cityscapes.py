# PSPNet on Cityscapes with a ResNet-18-DBB backbone that starts as the plain
# ImageNet ResNet-18-v1c that mmseg starts from.
_base_ = './resnet18_dbb_cityscapes.py'

model = dict(
    backbone=dict(
        type='mmpretrain.ResNetV1cDBB',
        init_cfg=dict(
            type='PlainPretrained', checkpoint='open-mmlab://resnet18_v1c'
        ),
    ),
)
