# ResNet-50 without blocks on ImageNet in OREPA's training, its baseline
# (arXiv:2204.00826).
#
# Other than resnet50_plain_imagenet.py, which follows the DBB paper.
_base_ = [
    './_base_/resnet50.py',
    './_base_/imagenet_orepa.py',
]
