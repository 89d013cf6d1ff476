# VGG-16 with the Asymmetric Convolution Blocks of ACNet (arXiv:1908.03930) on
# CIFAR-100, which DBB is compared with.
_base_ = './_base_/cifar100_acnet.py'

model = dict(
    backbone=dict(
        # do_acnet.py: the weights of the three norms start at 0.333
        block=dict(type='ACB', gamma_init=0.333),
    ),
)
