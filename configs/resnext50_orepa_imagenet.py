# ResNeXt-50 32x4d with OREPA on ImageNet (arXiv:2204.00826): its convolutions,
# the stem and 1x1 ones too, are composed online.
_base_ = [
    './_base_/resnext50.py',
    './_base_/imagenet_orepa.py',
]

model = dict(
    backbone=dict(
        type='mmpretrain.ResNeXtDBB',
        block=dict(type='OREPA'),
    ),
)
