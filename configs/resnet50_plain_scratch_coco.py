# Faster R-CNN on COCO with a ResNet-50 without blocks, from scratch: the
# baseline, trained in the same way.
_base_ = './resnet50_dbb_scratch_coco.py'

model = dict(backbone=dict(type='mmpretrain.ResNet'))
