# How ACNet (arXiv:1908.03930), and DBB after it, train VGG-16 on CIFAR-10.
# The numbers are those of github.com/DingXiaoH/ACNet: `acnet/do_acnet.py`
# (network type `vc`), which calls `ndp_train.py` (optimizer, loop, loss) with
# `data/data_factory.py`, `utils/lr_scheduler.py` and `base_model/vgg.py`.
# DBB's code has nothing for CIFAR.
_base_ = [
    'mmpretrain::_base_/datasets/cifar10_bs16.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

# data_factory.py; images are padded by 4 pixels, cropped and flipped, as the
# base's
data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3)
train_dataloader = dict(batch_size=128)  # do_acnet.py
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmpretrain.VGGDBB',
        depth=16,
        norm_cfg=dict(type='BN', requires_grad=True),
        init_cfg=dict(type='TorchDefault'),  # as ndp_train.py
    ),
    # Of maps of a single pixel: images of 32 are halved five times.
    neck=dict(type='GlobalAveragePooling'),
    # vgg.py: a hidden layer of 512, no dropout
    head=dict(
        type='StackedLinearClsHead',
        num_classes=10,
        in_channels=512,
        mid_channels=[512],
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        init_cfg=dict(type='TorchDefault'),
    ),
)

optim_wrapper = dict(
    # do_acnet.py; biases and norms are decayed like all else
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
    constructor='ReparamOptimWrapperConstructor',
    # ndp_train.py, sgd_optimizer: 'bias' in its name, those of norms too
    paramwise_cfg=dict(bias_lr_mult=2.0),
)
# lr_scheduler.py: cosine to zero over 400 epochs, no warm-up
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=400,
    eta_min=0.0,
    by_epoch=True,
    convert_to_iter_based=True,
)
# do_acnet.py: 400 epochs, tested every fifth
train_cfg = dict(by_epoch=True, max_epochs=400, val_interval=5)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=128)  # do_acnet.py
