# mmpretrain's ResNet-18, started as the papers' code does: outside blocks it
# keeps what torch gives a layer, and no residual branch starts as zero.
_base_ = 'mmpretrain::_base_/models/resnet18.py'

start = dict(type='TorchDefault')
model = dict(
    backbone=dict(zero_init_residual=False, init_cfg=start),
    head=dict(init_cfg=start),
)
