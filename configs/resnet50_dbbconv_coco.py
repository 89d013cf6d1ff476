# Faster R-CNN on COCO, 1x, on mmdet's own ResNet-50 and FPN with DBB as their
# convolution: the hosts' norms stay behind the blocks.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdbb'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        conv_cfg=dict(type='DBB'),
        # From scratch no statistics may be frozen.
        frozen_stages=-1,
        norm_eval=False,
        # torchvision's weights are a plain network's and do not fit. Ours:
        # init_cfg=dict(
        #     type='Pretrained',
        #     checkpoint='work_dirs/resnet50_dbbconv_imagenet/epoch_120.pth',
        #     prefix='backbone.',
        # ),
        init_cfg=None,
    ),
    neck=dict(conv_cfg=dict(type='DBB')),
)
