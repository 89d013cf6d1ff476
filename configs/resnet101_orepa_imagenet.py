# ResNet-101 with OREPA on ImageNet (arXiv:2204.00826): its convolutions, the
# stem and 1x1 ones too, are composed online.
_base_ = [
    './_base_/resnet101.py',
    './_base_/imagenet_orepa.py',
]

model = dict(
    backbone=dict(
        type='mmpretrain.ResNetDBB',
        block=dict(type='OREPA'),
    ),
)
