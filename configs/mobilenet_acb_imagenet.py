# MobileNet-V1 with the Asymmetric Convolution Blocks of ACNet
# (arXiv:1908.03930) on ImageNet, which DBB is compared with: the same
# training.
_base_ = './mobilenet_dbb_imagenet.py'

model = dict(backbone=dict(block=dict(type='ACB')))
