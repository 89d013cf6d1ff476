"""The narrow RepVGG, trained on for INT8: its kernels are fake-quantized.

Starts from what `configs/demo/repvgg_mnist5k.py` was trained to.
"""

_base_ = './repvgg_mnist5k.py'
custom_imports = dict(
    imports=['mmdbb.backbones', 'mmdbb.quantize'],
    allow_failed_imports=False,
)

load_from = 'work_dirs/repvgg_mnist5k/epoch_10.pth'
custom_hooks = [dict(type='QATHook', begin=0, freeze=2)]

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
