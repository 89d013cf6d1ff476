# Cascade Mask R-CNN with UniRepLKNet-S on COCO, 3x: the config
# `casc_mask_rcnn_unireplknet_s_in1k_fpn_3x_coco.py` of the same code.
_base_ = './unireplknet-t_dilated_cascade_coco.py'

model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.5,  # theirs
        init_cfg=dict(
            checkpoint='checkpoints/unireplknet_s_in1k_224_acc83.91.pth'
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
