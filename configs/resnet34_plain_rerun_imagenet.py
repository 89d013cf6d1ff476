# ResNet-34 without blocks on ImageNet in OREPA's training, its baseline
# (arXiv:2204.00826).
_base_ = [
    './_base_/resnet34.py',
    './_base_/imagenet_orepa.py',
]
