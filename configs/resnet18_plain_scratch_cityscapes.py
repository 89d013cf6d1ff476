# PSPNet on Cityscapes with a ResNet-18 without blocks, from scratch: the
# baseline, trained in the same way.
_base_ = './resnet18_dbb_scratch_cityscapes.py'

model = dict(backbone=dict(type='mmseg.ResNet'))
