# RepOpt-VGG-L1 on ImageNet, otherwise as RepOpt-VGG-B1.
_base_ = './repvgg-b1_imagenet.py'

scales = 'work_dirs/repvgg-l1_search_cifar100/scales.pth'
arch = dict(
    _delete_=True,
    num_blocks=[8, 14, 24, 1],
    width_factor=[2, 2, 2, 4],
    group_layer_map=None,
    se_cfg=None,
)
model = dict(init_cfg=dict(scales=scales), backbone=dict(arch=arch))
optim_wrapper = dict(paramwise_cfg=dict(scales=scales))
