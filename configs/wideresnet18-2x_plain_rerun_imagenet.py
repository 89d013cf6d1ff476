# ResNet-18 of 2x width without blocks on ImageNet in OREPA's training, its
# baseline (arXiv:2204.00826).
_base_ = [
    './_base_/resnet18.py',
    './_base_/imagenet_orepa.py',
]

model = dict(
    backbone=dict(
        base_channels=128,
        stem_channels=128,
    ),
    head=dict(in_channels=1024),
)
