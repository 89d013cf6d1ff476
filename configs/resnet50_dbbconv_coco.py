# Faster R-CNN on COCO, 1x, on mmdet's own ResNet-50 and FPN with DBB as their
# convolution: the hosts' norms stay behind the blocks.
# Starts from one's own ImageNet run; other starts stand in docs/recipes.md.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdbb'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        conv_cfg=dict(type='DBB'),
        init_cfg=dict(
            type='BackbonePretrained',
            checkpoint=(
                'work_dirs/resnet50_dbbconv_rerun_imagenet/epoch_120.pth'
            ),
        ),
    ),
    neck=dict(conv_cfg=dict(type='DBB')),
)
