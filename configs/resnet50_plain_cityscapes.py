# PSPNet on Cityscapes with a ResNet-50 without blocks: the baseline, trained
# in the same way. It starts from its own ImageNet run.
_base_ = './resnet50_dbb_cityscapes.py'

model = dict(
    backbone=dict(
        type='mmseg.ResNet',
        init_cfg=dict(
            checkpoint='work_dirs/resnet50_plain_rerun_imagenet/epoch_120.pth',
        ),
    ),
)
