# PSPNet on Cityscapes with a ResNet-18-v1c without blocks: the baseline, from
# the same ImageNet weights.
_base_ = './resnet18_dbb_from_plain_cityscapes.py'

model = dict(
    backbone=dict(
        type='mmseg.ResNetV1c',
        init_cfg=dict(type='Pretrained'),
    ),
)
