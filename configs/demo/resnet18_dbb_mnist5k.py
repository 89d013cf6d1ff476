"""Handwritten digits (MNIST-5k) with a narrow ResNet-18-DBB.

The data come from `tools/prepare_demo_data.py --task classification`.
"""

_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        # Mean and standard deviation of the training images, with margin.
        mean=[33.3] * 3,
        std=[78.6] * 3,
        to_rgb=True,
        num_classes=10,
    ),
    backbone=dict(
        type='mmpretrain.ResNetDBB',
        block=dict(type='DBB'),
        depth=18,
        stem_channels=16,
        base_channels=16,  # 64 in the standard network
        strides=(1, 2, 2, 1),
    ),  # 2 x 2 pixels are left at the end
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=128,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
)

classes = [str(digit) for digit in range(10)]
# The digits are 28 x 28 pixels.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='Rotate', angle=10.0, prob=0.5),  # never flipped
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Pad', size=(32, 32)),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=80,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ImageNet',
        data_root='data/mnist5k',
        split='train',
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ImageNet',
        data_root='data/mnist5k',
        split='val',
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

max_epochs = 10
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=5)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=50),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=1, max_keep_ckpts=1),
)
randomness = dict(seed=0, deterministic=False)
