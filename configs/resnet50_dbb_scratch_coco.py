# Faster R-CNN with FPN on COCO with a ResNet-50-DBB backbone, from scratch:
# mmdet's recipe for that, six times the 1x schedule (arXiv:1811.08883). Its
# norms are of groups, which no block can be merged with; the backbone's are
# synchronised batch norms, the other norms that work there.
_base_ = 'mmdet::scratch/faster-rcnn_r50-scratch_fpn_gn-all_6x_coco.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ResNetDBB',
        depth=50,
        out_indices=(0, 1, 2, 3),
        zero_init_residual=False,  # as mmdet's
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        # As the ImageNet recipes: baseline and blocks start alike.
        init_cfg=dict(type='TorchDefault'),
    ),
)
