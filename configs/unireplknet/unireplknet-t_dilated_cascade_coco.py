# Cascade Mask R-CNN with UniRepLKNet-T on COCO, 3x: the config
# `casc_mask_rcnn_unireplknet_t_in1k_fpn_3x_coco.py` in `detection` of
# github.com/AILab-CVC/UniRepLKNet. mmdet's config for ConvNeXt-T has the same
# heads (four convolutions, GIoU loss), images and schedule.
_base_ = (
    'mmdet::convnext/'
    'cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'
)
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.UniRepLKNet',
        arch='t',
        drop_path_rate=0.3,  # theirs
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
        with_cp=True,  # theirs: with_cp=True
        norm_cfg=dict(type='SyncBN'),  # theirs: use_sync_bn=True
        # The authors' weights, from huggingface.co/DingXiaoH/UniRepLKNet.
        init_cfg=dict(
            type='OfficialPretrained',
            checkpoint='checkpoints/unireplknet_t_in1k_224_acc83.21.pth',
        ),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)

# theirs: two images on each of 8 GPUs, in float32
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=0.8),
    optimizer=dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    ),
)
# theirs: 500 iterations of warm-up
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500
    ),
    dict(
        type='MultiStepLR',
        begin=0,
        end=36,
        by_epoch=True,
        milestones=[27, 33],
        gamma=0.1,
    ),
]
