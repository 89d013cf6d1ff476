# How UniRepLKNet (arXiv:2311.15599) is trained on ImageNet-1K: the commands in
# `Image/README.md` of github.com/AILab-CVC/UniRepLKNet and the defaults of its
# `main.py`, which is ConvNeXt's. mmpretrain's recipe for Swin and ConvNeXt is
# the base; what stands here differs from it, or is said by the README.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmpretrain.UniRepLKNet'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        # main.py: --smoothing 0.1
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
        ),
        init_cfg=None,
    ),
    # unireplknet.py: `_init_weights`; blocks draw theirs likewise
    init_cfg=dict(
        type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0
    ),
)

# README: 4096 images a step, as 4 GPUs x 128 x 8 steps of accumulation
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(
    optimizer=dict(lr=4e-3),  # README: --lr 4e-3
    accumulative_counts=8,  # README: --update_freq 8
    clip_grad=None,  # main.py: --clip_grad None
)
# main.py: 20 epochs of warm-up, then a cosine to --min_lr 1e-6
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        end=20,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=20),
]
auto_scale_lr = dict(base_batch_size=4096)
