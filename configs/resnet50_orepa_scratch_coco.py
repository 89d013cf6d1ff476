# Faster R-CNN with FPN on COCO with a ResNet-50-OREPA backbone, from scratch.
_base_ = './resnet50_dbb_scratch_coco.py'

model = dict(backbone=dict(block=dict(type='OREPA')))
