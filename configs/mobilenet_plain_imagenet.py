# MobileNet-V1 without blocks on ImageNet, DBB's baseline: the same training
# (`train.py -t base` of the DBB code).
_base_ = './mobilenet_dbb_imagenet.py'

model = dict(backbone=dict(type='mmpretrain.MobileNetV1'))
