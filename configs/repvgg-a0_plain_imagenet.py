# RepVGG-A0 of plain convolutions and norms (`-t base` of OREPA's code) on
# ImageNet, trained as OREPA's.
_base_ = './repvgg-a0_repvgg_imagenet.py'

model = dict(
    backbone=dict(_delete_=True, type='mmpretrain.PlainRepVGG', arch='A0'),
)

optim_wrapper = dict(paramwise_cfg=dict(custom_l2=False))
