# How the OREPA paper (arXiv:2204.00826) trains on ImageNet, whatever the
# block. The numbers are those of its code, github.com/JUGGHM/OREPA_CVPR2022:
# `train.py` (defaults) and, for images, `utils.py` (crop and flip only, as
# mmpretrain's).
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

# train.py: 256 images a step, the base's 32 on each of 8 GPUs
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
    # train.py, sgd_optimizer
    constructor='ReparamOptimWrapperConstructor',
    paramwise_cfg=dict(
        bias_lr_mult=2.0,
        # 'bias', 'bn' and 'prior' in its name
        bias_decay_mult=0.0,
        norm_decay_mult=0.0,
        custom_keys=dict(prior=dict(decay_mult=0.0)),
    ),
)
param_scheduler = [
    # Five epochs, as the paper says; its code's scheduler counts iterations,
    # and so warms up for five of them (`warmup=args.epochs/24`).
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
        T_max=115,
        eta_min=0.0,
        begin=5,
        end=120,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=120, val_interval=1)  # train.py
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=256)  # train.py
