"""Photographs of your own in folders, classified by a ResNet-18-DBB.

Copy this file and change the lines down to the dashes. docs/own_data.md tells
how the folders look, and what is checked before the training.
"""

_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

# data_root/train/CLASS/*.jpg, data_root/val/CLASS/*.jpg; the classes in
# alphabetical order, as the folders are counted.
data_root = 'data/own_classification/'
classes = ('flower', 'temple')
image_size = 224  # pixels
batch_size = 32  # on one GPU
max_epochs = 20
# Plain weights that the blocks start from; None for a random start.
start = dict(type='PlainPretrained', checkpoint='torchvision://resnet18')
# ----------------------------------------------------------------------------

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
        num_classes=len(classes),
    ),
    backbone=dict(
        type='mmpretrain.ResNetDBB',
        block=dict(type='DBB'),
        depth=18,
        init_cfg=start,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=len(classes),
        in_channels=512,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=image_size),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=round(image_size * 8 / 7), edge='short'),
    dict(type='CenterCrop', crop_size=image_size),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val',
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    # For a batch of 256; train with --auto-scale-lr.
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-4)
)
auto_scale_lr = dict(base_batch_size=256)
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=max_epochs,
    by_epoch=True,
    convert_to_iter_based=True,
)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=1, max_keep_ckpts=2, save_best='auto'),
)
