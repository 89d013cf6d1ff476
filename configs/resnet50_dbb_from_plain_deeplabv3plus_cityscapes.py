# DeepLabV3+ on Cityscapes, 40k iterations, with a ResNet-50-DBB backbone that
# starts as the plain ImageNet ResNet-50-v1c that mmseg starts from.
_base_ = './resnet50_dbb_deeplabv3plus_cityscapes.py'

model = dict(
    backbone=dict(
        type='mmpretrain.ResNetV1cDBB',
        init_cfg=dict(
            type='PlainPretrained', checkpoint='open-mmlab://resnet50_v1c'
        ),
    ),
)
