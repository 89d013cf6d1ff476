# AlexNet with norms and no blocks on ImageNet, DBB's baseline: the same
# training (`train.py -t base` of the DBB code).
_base_ = './alexnet_dbb_imagenet.py'

model = dict(backbone=dict(type='mmpretrain.PlainAlexNet'))
