# ResNet-18-DBB on ImageNet, as trained for the paper (arXiv:2103.13425). Its
# code, github.com/DingXiaoH/DiverseBranchBlock, has stronger augmentation for
# ResNets than for other networks: `utils.py`, `strong_train_preprocess`.
_base_ = [
    './_base_/resnet18.py',
    './_base_/imagenet_dbb.py',
]

model = dict(backbone=dict(type='mmpretrain.ResNetDBB'))

train_pipeline = [
    {{_base_.load}},
    dict(type='RandomResizedCrop', scale=224, backend='pillow'),
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
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
