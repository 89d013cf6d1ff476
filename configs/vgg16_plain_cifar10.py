# VGG-16 with norms and no blocks on CIFAR-10, the baseline of DBB and ACNet.
_base_ = './_base_/cifar10_acnet.py'

model = dict(backbone=dict(type='VGG'))
