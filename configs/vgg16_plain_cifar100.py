# VGG-16 with norms and no blocks on CIFAR-100, the baseline of DBB and ACNet.
_base_ = './_base_/cifar100_acnet.py'

model = dict(backbone=dict(type='VGG'))
