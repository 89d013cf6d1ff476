# ResNet-18 with the Asymmetric Convolution Blocks of ACNet (arXiv:1908.03930)
# on ImageNet, which DBB is compared with: the same training
# (`train.py -t ACB` of the DBB code).
_base_ = './resnet18_dbb_imagenet.py'

model = dict(backbone=dict(block=dict(type='ACB')))
