# RetinaNet with FPN on COCO, 1x, with a ResNet-50-DBB backbone: a baseline of
# the OREPA paper (arXiv:2204.00826), in mmdet's recipe.
# Starts from one's own ImageNet run; other starts stand in docs/recipes.md.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ResNetDBB',
        depth=50,
        out_indices=(0, 1, 2, 3),
        # mmdet's own settings for pretrained weights
        frozen_stages=1,
        norm_eval=True,
        # Trained as OREPA's, see the config of that name.
        init_cfg=dict(
            type='BackbonePretrained',
            checkpoint='work_dirs/resnet50_dbb_rerun_imagenet/epoch_120.pth',
        ),
    ),
)
