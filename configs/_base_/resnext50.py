# mmpretrain's ResNeXt-50 32x4d, started as the papers' code does.
_base_ = 'mmpretrain::_base_/models/resnext50_32x4d.py'

start = dict(type='TorchDefault')
model = dict(
    backbone=dict(zero_init_residual=False, init_cfg=start),
    head=dict(init_cfg=start),
)
