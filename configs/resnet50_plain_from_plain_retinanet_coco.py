# RetinaNet on COCO with a ResNet-50 without blocks: the baseline, from the
# same ImageNet weights.
_base_ = './resnet50_dbb_from_plain_retinanet_coco.py'

model = dict(
    backbone=dict(
        type='mmpretrain.ResNet',
        init_cfg=dict(type='Pretrained'),
    ),
)
