# What both papers' codes share on ImageNet: the defaults of `train.py` of
# github.com/DingXiaoH/DiverseBranchBlock, from which OREPA's is made. What
# the recipes add stands in imagenet_dbb.py and imagenet_orepa.py, and where
# the networks start from in resnet18.py and the like.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

# torchvision's ImageFolder, RandomResizedCrop and Resize: pixels as PIL reads
# them, which turns no image by its EXIF tag, and as it resizes them, which
# smooths what it shrinks. mmpretrain's defaults are OpenCV's, which do not.
load = dict(
    type='LoadImageFromFile',
    imdecode_backend='pillow',
    color_type='color_ignore_orientation',
)
train_pipeline = [
    load,
    dict(type='RandomResizedCrop', scale=224, backend='pillow'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    load,
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
    constructor='ReparamOptimWrapperConstructor',
    # sgd_optimizer: 'bias' in its name, those of norms too
    paramwise_cfg=dict(bias_lr_mult=2.0),
)
train_cfg = dict(by_epoch=True, max_epochs=120, val_interval=1)
val_cfg = dict()
test_cfg = dict()
# 256 images a step: the base's 32 on each of 8 GPUs
auto_scale_lr = dict(base_batch_size=256)
env_cfg = dict(cudnn_benchmark=True)  # train.py
