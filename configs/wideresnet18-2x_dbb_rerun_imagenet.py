# ResNet-18 of 2x width with DBB on ImageNet in OREPA's training, which
# compares the two so (arXiv:2204.00826).
_base_ = './wideresnet18-2x_orepa_imagenet.py'

model = dict(backbone=dict(block=dict(_delete_=True, type='DBB')))
