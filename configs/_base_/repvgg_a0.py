# RepVGG-A0 (arXiv:2101.03697), started as its code does: outside blocks it
# keeps what torch gives a layer.
start = dict(type='TorchDefault')
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmpretrain.ReparamRepVGG', arch='A0', init_cfg=start),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1280,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5),
        init_cfg=start,
    ),
)
