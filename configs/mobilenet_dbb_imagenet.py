# MobileNet-V1-DBB on ImageNet (arXiv:2103.13425). Images are cropped
# and flipped only, as `train.py` of the official code does for all but
# ResNets. Depthwise blocks are twice as wide inside, DBB's default for them.
_base_ = './_base_/imagenet_dbb.py'

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmpretrain.MobileNetV1DBB',
        init_cfg=dict(type='TorchDefault'),  # as the papers' code
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1024,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5),
        init_cfg=dict(type='TorchDefault'),
    ),
)

# train.py, sgd_optimizer: 'depth' in its name
optim_wrapper = dict(paramwise_cfg=dict(depthwise_decay_mult=0.0))
