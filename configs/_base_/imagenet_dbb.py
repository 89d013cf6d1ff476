# How the DBB paper (arXiv:2103.13425) trains on ImageNet. The numbers are
# those of its code, github.com/DingXiaoH/DiverseBranchBlock: `train.py`
# (defaults) and, for images, `utils.py` (`standard_train_preprocess`: crop
# and flip only, as mmpretrain's).
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
        # 'bias' in its name, those of norms too
        bias_lr_mult=2.0,
        # 'depth' in its name
        depthwise_decay_mult=0.0,
    ),
)
# train.py: cosine to zero, stepped every iteration, no warm-up
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=120,
    eta_min=0.0,
    by_epoch=True,
    convert_to_iter_based=True,
)
train_cfg = dict(by_epoch=True, max_epochs=120, val_interval=1)  # train.py
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=256)  # train.py
