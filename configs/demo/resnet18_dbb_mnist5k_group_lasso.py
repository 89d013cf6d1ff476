"""The narrow ResNet-18-DBB, trained for few filters, to be pruned.

See `tools/prune.py`; the filters of merged kernels are what is penalised.
"""

_base_ = './resnet18_dbb_mnist5k.py'
custom_imports = dict(
    imports=['mmdbb.backbones', 'mmdbb.prune'],
    allow_failed_imports=False,
)

custom_hooks = [
    dict(type='KernelPenaltyHook', kind='group_lasso', weight=1e-5)
]
