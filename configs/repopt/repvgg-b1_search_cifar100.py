# RepOptimizer's search (arXiv:2205.15242, sec. 3.2): RepVGG-B1 of scaled
# branches on CIFAR-100. The numbers are those of its code,
# github.com/DingXiaoH/RepOptimizers: `readme_reproduce_experiments.txt`,
# `config.py`, `optimizer.py`, `data/build.py` and
# `repoptimizer/repoptvgg_model.py`. Then
#   python tools/repopt.py configs/repopt/repvgg-b1_search_cifar100.py \
#       work_dirs/repvgg-b1_search_cifar100/epoch_240.pth \
#       work_dirs/repvgg-b1_search_cifar100/scales.pth
_base_ = [
    'mmpretrain::_base_/datasets/cifar100_bs16.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

# readme_reproduce_experiments.txt: 256 images on one GPU, 240 epochs
train_dataloader = dict(batch_size=256)
val_dataloader = dict(batch_size=256)
test_dataloader = val_dataloader
# repoptvgg_model.py, conv_scale_init: the root of 2 / i for the i-th unit of a
# stage; the stem and the first unit of each stage start with 1
later = [
    dict(
        type='LinearAdd',
        only=f'backbone.stage_?.{i}.*',
        scale_init=(2 / i) ** 0.5,
    )
    for i in range(1, 16)
]
start = dict(type='TorchDefault')
model = dict(
    type='WithBlocks',
    network='ImageClassifier',
    blocks=[*later, dict(type='LinearAdd')],
    backbone=dict(type='mmpretrain.PlainRepVGG', arch='B1', init_cfg=start),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=100,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        init_cfg=start,
    ),
)
optim_wrapper = dict(
    optimizer=dict(
        type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=4e-5
    ),
    constructor='ReparamOptimWrapperConstructor',
    # optimizer.py: no decay for what has one dimension, but for the identity
    paramwise_cfg=dict(
        bias_decay_mult=0.0,
        norm_decay_mult=0.0,
        custom_keys={
            'generator.scales': dict(decay_mult=0.0),
            'generator.scales.identity': dict(decay_mult=1.0),
        },
    ),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,  # from zero in the code, which mmengine cannot
        begin=0,
        end=5,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=235,
        eta_min=0.0,
        begin=5,
        end=240,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=240, val_interval=5)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=256)
