# ResNet-18 with the gradients of DBB's linear branches, on ImageNet: the
# training of the DBB paper (arXiv:2103.13425), otherwise that of a baseline.
# Any other *_plain_*.py is trained so by the same four lines.
_base_ = '../resnet18_plain_imagenet.py'

# Written by tools/repopt.py, of the search
scales = 'work_dirs/resnet18_search_cifar100/scales.pth'
model = dict(init_cfg=dict(type='RepOpt', scales=scales))
optim_wrapper = dict(
    constructor='RepOptimWrapperConstructor',
    paramwise_cfg=dict(scales=scales),
)
