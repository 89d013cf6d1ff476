# The same PSPNet with Asymmetric Convolution Blocks (arXiv:1908.03930), which
# DBB is compared with.
_base_ = './resnet18_dbb_cityscapes.py'

model = dict(
    backbone=dict(
        block=dict(type='ACB'),
        init_cfg=dict(
            checkpoint='work_dirs/resnet18_acb_imagenet/epoch_120.pth',
        ),
    ),
)
