"""The narrow RepVGG, merged, with a norm behind each convolution again.

Starts from what `tools/quantize.py ... --insert-bn` writes of the trained one.
"""

_base_ = './repvgg_mnist5k.py'

model = dict(backbone=dict(block=dict(type='ConvBN')))

load_from = 'work_dirs/repvgg_mnist5k/insert_bn.pth'

# A short training at a tenth of the learning rate.
max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(checkpoint=dict(interval=max_epochs))
