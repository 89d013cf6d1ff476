# CenterNet on COCO with a ResNet-18-DBB backbone: the detector that the DBB
# paper (arXiv:2103.13425) shows generalization with, in mmdet's recipe. The
# paper's 126k iterations, from a learning rate of 0.02, with steps at 81k and
# 108k, are its 140 epochs with steps at 90 and 120 for 900 iterations each.
# Starts from one's own ImageNet run; other starts stand in docs/recipes.md.
_base_ = 'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ResNetDBB',
        depth=18,
        out_indices=(3,),  # all that the neck reads
        norm_eval=False,  # as mmdet's
        init_cfg=dict(
            type='BackbonePretrained',
            checkpoint='work_dirs/resnet18_dbb_imagenet/epoch_120.pth',
        ),
    ),
)
