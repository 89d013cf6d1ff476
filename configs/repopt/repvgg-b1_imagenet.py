# RepOpt-VGG-B1 (arXiv:2205.15242) on ImageNet: a plain RepVGG-B1, trained with
# the gradients of scaled branches. The numbers are those of its code, see
# repvgg-b1_search_cifar100.py; the images are cropped, flipped and augmented.
_base_ = ['../_base_/imagenet_orepa.py']

# Written by tools/repopt.py, of the search or of the authors' own file,
# RepOpt-VGG-B1-scales.pth in their repository.
scales = 'work_dirs/repvgg-b1_search_cifar100/scales.pth'
start = dict(type='TorchDefault')
model = dict(
    type='ImageClassifier',
    init_cfg=dict(type='RepOpt', scales=scales),
    backbone=dict(type='mmpretrain.PlainRepVGG', arch='B1', init_cfg=start),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(
            type='LabelSmoothLoss',
            label_smooth_val=0.1,  # MODEL.LABEL_SMOOTHING
            mode='original',
            loss_weight=1.0,
        ),
        topk=(1, 5),
        init_cfg=start,
    ),
)
# AUG.PRESET raug15: two transformations of uniform magnitudes, in the code up
# to 14 of 10; mmpretrain's go up to 10, and its list is not quite the code's.
train_pipeline = [
    dict(
        type='LoadImageFromFile',
        imdecode_backend='pillow',
        color_type='color_ignore_orientation',
    ),
    dict(type='RandomResizedCrop', scale=224, backend='pillow'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=10,
        magnitude_std='inf',
    ),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(
    optimizer=dict(
        type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=4e-5
    ),
    constructor='RepOptimWrapperConstructor',
    # optimizer.py: no decay for what has one dimension
    paramwise_cfg=dict(
        _delete_=True,
        scales=scales,
        bias_decay_mult=0.0,
        norm_decay_mult=0.0,
    ),
)
