# ResNet-101 without blocks on ImageNet in OREPA's training, its baseline
# (arXiv:2204.00826).
_base_ = [
    './_base_/resnet101.py',
    './_base_/imagenet_orepa.py',
]
