# VGG-16-DBB on CIFAR-100 (arXiv:2103.13425).
_base_ = './_base_/cifar100_acnet.py'
