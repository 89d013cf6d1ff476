# ResNet-50 without blocks on ImageNet, DBB's baseline: the same training
# (`train.py -t base` of the DBB code).
_base_ = './resnet50_dbb_imagenet.py'

model = dict(backbone=dict(type='ResNet'))
