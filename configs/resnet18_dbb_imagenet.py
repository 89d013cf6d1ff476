# ResNet-18-DBB on ImageNet, as trained for the paper (arXiv:2103.13425).
# The numbers are those of the official code, github.com/DingXiaoH/
# DiverseBranchBlock: `train.py` (defaults) and `utils.py`
# (`strong_train_preprocess`, which it uses for ResNets).
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(backbone=dict(type='mmpretrain.ResNetDBB'))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    # utils.py: 0.4 each; it jitters the hue and leaves the contrast. It is
    # torchvision's, as there; mmcv's fails on half of all hues with numpy 2.
    dict(type='NumpyToPIL', to_rgb=True),
    dict(
        type='torchvision/ColorJitter',
        brightness=0.4,
        saturation=0.4,
        hue=0.4,
    ),
    dict(type='PILToNumpy', to_bgr=True),
    # Turns pixels into floats and does nothing else: Lighting keeps the type,
    # and in bytes its shift would wrap around (258 to 2).
    dict(type='Normalize', mean=[0] * 3, std=[1] * 3, to_rgb=False),
    dict(
        type='Lighting',
        alphastd=0.1,  # utils.py
        # utils.py's eigenvalues times 255 (pixels are not yet in 0..1) and
        # its eigenvectors, rows from the last to the first: images are BGR
        eigval=[55.4625, 4.7940, 1.1475],
        eigvec=[
            [-0.5836, -0.6948, 0.4203],
            [-0.5808, -0.0045, -0.8140],
            [-0.5675, 0.7192, 0.4009],
        ],
    ),
    dict(type='PackInputs'),
]
# train.py: 256 images a step, the base's 32 on each of 8 GPUs
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(
    # train.py; the base's as well, written out because they are the paper's
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
    # train.py, sgd_optimizer: twice the rate for every parameter with `bias`
    # in its name, those of norms too, and the same weight decay
    paramwise_cfg=dict(custom_keys=dict(bias=dict(lr_mult=2.0))),
)
train_cfg = dict(max_epochs=120)  # train.py
# train.py: cosine to zero, stepped every iteration, no warm-up
param_scheduler = dict(
    _delete_=True,
    type='CosineAnnealingLR',
    T_max=120,
    eta_min=0.0,
    by_epoch=True,
    convert_to_iter_based=True,
)
auto_scale_lr = dict(base_batch_size=256)  # train.py
