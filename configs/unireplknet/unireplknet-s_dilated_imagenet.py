# UniRepLKNet-S on ImageNet-1K, as in `Image/README.md` of its code.
_base_ = './_base_/imagenet.py'

model = dict(
    # README: --model unireplknet_s --drop_path 0.4
    backbone=dict(arch='s', drop_path_rate=0.4),
    head=dict(in_channels=768),
    # README: --mixup 0.8 --cutmix 1.0
    train_cfg=dict(
        augments=[
            dict(type='Mixup', alpha=0.8),
            dict(type='CutMix', alpha=1.0),
        ]
    ),
)
train_dataloader = dict(batch_size=64)  # README: on 8 GPUs
