# CenterNet on COCO with a ResNet-18-DBB backbone: the detector that the DBB
# paper (arXiv:2103.13425) shows generalization with, in mmdet's recipe. The
# paper's 126k iterations, from a learning rate of 0.02, with steps at 81k and
# 108k, are its 140 epochs with steps at 90 and 120 for 900 iterations each.
_base_ = 'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ResNetDBB',
        depth=18,
        out_indices=(3,),  # all that the neck reads
        # As in mmdet's recipe; from scratch none may be frozen anyway.
        norm_eval=False,
        # torchvision's weights are a plain network's and do not fit, so
        # this starts from scratch. To start from our ImageNet checkpoint:
        # init_cfg=dict(
        #     type='Pretrained',
        #     checkpoint='work_dirs/resnet18_dbb_imagenet/epoch_120.pth',
        #     prefix='backbone.',
        # ),
    ),
)
