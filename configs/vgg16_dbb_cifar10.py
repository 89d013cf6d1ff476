# VGG-16-DBB on CIFAR-10 (arXiv:2103.13425).
_base_ = './_base_/cifar10_acnet.py'
