# ResNet-50-DBB on ImageNet: trained as ResNet-18-DBB is (train.py of the
# official code has one set of defaults for both).
_base_ = './resnet18_dbb_imagenet.py'

model = dict(
    backbone=dict(depth=50),
    head=dict(in_channels=2048),  # mmpretrain's resnet50
)
