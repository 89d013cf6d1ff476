# UniRepLKNet-N on ImageNet-1K, as in `Image/README.md` of its code.
_base_ = './_base_/imagenet.py'

model = dict(
    # README: --model unireplknet_n --drop_path 0.1
    backbone=dict(arch='n', drop_path_rate=0.1),
    head=dict(in_channels=640),
    # README: --mixup 0.5 --cutmix 0.5
    train_cfg=dict(
        augments=[
            dict(type='Mixup', alpha=0.5),
            dict(type='CutMix', alpha=0.5),
        ]
    ),
)
