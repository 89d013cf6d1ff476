# ResNet-101 with DBB on ImageNet in OREPA's training, which compares the two
# so (arXiv:2204.00826).
_base_ = './resnet101_orepa_imagenet.py'

model = dict(backbone=dict(block=dict(_delete_=True, type='DBB')))
