# ResNet-18 with DBB on ImageNet in OREPA's training, which compares the two so
# (arXiv:2204.00826).
#
# Other than resnet18_dbb_imagenet.py, which follows the DBB paper.
_base_ = './resnet18_orepa_imagenet.py'

model = dict(backbone=dict(block=dict(_delete_=True, type='DBB')))
