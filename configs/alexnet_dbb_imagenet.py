# AlexNet-DBB on ImageNet (arXiv:2103.13425).
_base_ = './_base_/imagenet_dbb.py'

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmpretrain.AlexNetDBB',
        num_classes=1000,
        init_cfg=dict(type='TorchDefault'),  # as the papers' code
    ),
    # The classifier is part of the backbone, as in mmpretrain's AlexNet.
    head=dict(
        type='ClsHead',
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5),
    ),
)
