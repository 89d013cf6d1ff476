# ResNeXt-50 32x4d without blocks on ImageNet in OREPA's training, its baseline
# (arXiv:2204.00826).
_base_ = [
    'mmpretrain::_base_/models/resnext50_32x4d.py',
    './_base_/imagenet_orepa.py',
]

model = dict(
    backbone=dict(
        zero_init_residual=False,  # as the paper's code
    ),
)
