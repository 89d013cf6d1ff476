# ResNeXt-50 32x4d with DBB on ImageNet in OREPA's training, which compares the
# two so (arXiv:2204.00826).
_base_ = './resnext50_orepa_imagenet.py'

model = dict(backbone=dict(block=dict(_delete_=True, type='DBB')))
