# Faster R-CNN with FPN on COCO, 1x, with a ResNet-50-DBB backbone.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ResNetDBB',
        depth=50,
        out_indices=(0, 1, 2, 3),
        # From scratch no statistics may be frozen; with pretrained weights
        # mmdet's own frozen_stages=1 and norm_eval=True fit again.
        frozen_stages=-1,
        norm_eval=False,
        # torchvision's weights are a plain network's and do not fit, so
        # this starts from scratch. To start from our ImageNet checkpoint:
        # init_cfg=dict(
        #     type='Pretrained',
        #     checkpoint='work_dirs/resnet50_dbb_imagenet/epoch_120.pth',
        #     prefix='backbone.',
        # ),
    ),
)
