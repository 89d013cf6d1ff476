# The stock ResNet-50 with DBB as its convolution on ImageNet, in OREPA's
# training (arXiv:2204.00826): the COCO and Cityscapes configs start from it.
_base_ = './resnet50_plain_rerun_imagenet.py'

model = dict(backbone=dict(conv_cfg=dict(type='DBB')))
