# CenterNet on COCO with a ResNet-18 without blocks: the baseline, from the
# same ImageNet weights.
_base_ = './resnet18_dbb_from_plain_centernet_coco.py'

model = dict(
    backbone=dict(
        type='mmpretrain.ResNet',
        init_cfg=dict(type='Pretrained'),
    ),
)
