# PSPNet on Cityscapes with a ResNet-18 without blocks: the baseline, trained
# in the same way. It starts from its own ImageNet run.
_base_ = './resnet18_dbb_cityscapes.py'

model = dict(
    backbone=dict(
        type='mmseg.ResNet',
        init_cfg=dict(
            checkpoint='work_dirs/resnet18_plain_imagenet/epoch_120.pth',
        ),
    ),
)
