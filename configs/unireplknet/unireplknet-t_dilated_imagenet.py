# UniRepLKNet-T on ImageNet-1K, as in `Image/README.md` of its code.
_base_ = './_base_/imagenet.py'

model = dict(
    # README: --model unireplknet_t --drop_path 0.2
    backbone=dict(arch='t', drop_path_rate=0.2),
    head=dict(in_channels=640),
    # README: --mixup 0.8 --cutmix 1.0
    train_cfg=dict(
        augments=[
            dict(type='Mixup', alpha=0.8),
            dict(type='CutMix', alpha=1.0),
        ]
    ),
)
