# ResNet-18 without blocks on ImageNet in OREPA's training, its baseline
# (arXiv:2204.00826).
#
# Other than resnet18_plain_imagenet.py, which follows the DBB paper.
_base_ = [
    './_base_/resnet18.py',
    './_base_/imagenet_orepa.py',
]
