# ResNeXt-50 32x4d without blocks on ImageNet in OREPA's training, its baseline
# (arXiv:2204.00826).
_base_ = [
    './_base_/resnext50.py',
    './_base_/imagenet_orepa.py',
]
