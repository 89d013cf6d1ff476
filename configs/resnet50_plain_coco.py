# Faster R-CNN on COCO with a ResNet-50 without blocks: the baseline, trained
# in the same way. It starts from its own ImageNet run.
_base_ = './resnet50_dbb_coco.py'

model = dict(
    backbone=dict(
        type='mmpretrain.ResNet',
        init_cfg=dict(
            checkpoint='work_dirs/resnet50_plain_rerun_imagenet/epoch_120.pth',
        ),
    ),
)
