# mmpretrain's ResNet-34, otherwise as ResNet-18.
_base_ = './resnet18.py'

model = dict(backbone=dict(depth=34))
