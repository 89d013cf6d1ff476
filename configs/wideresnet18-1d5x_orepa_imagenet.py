# ResNet-18 of 1.5x width with OREPA on ImageNet (arXiv:2204.00826): its
# convolutions, the stem and 1x1 ones too, are composed online.
_base_ = [
    './_base_/resnet18.py',
    './_base_/imagenet_orepa.py',
]

model = dict(
    backbone=dict(
        type='mmpretrain.ResNetDBB',
        base_channels=96,
        stem_channels=96,
        block=dict(type='OREPA'),
    ),
    head=dict(in_channels=768),
)
