"""The narrow RepVGG, trained on for INT8: its kernels are fake-quantized.

Starts from what `configs/demo/repvgg_mnist5k.py` was trained to.
"""

_base_ = './_base_/repvgg_mnist5k_short.py'
custom_imports = dict(
    imports=['mmdbb.backbones', 'mmdbb.quantize'],
    allow_failed_imports=False,
)

load_from = 'work_dirs/repvgg_mnist5k/epoch_10.pth'
custom_hooks = [dict(type='QATHook', begin=0, freeze=2)]
