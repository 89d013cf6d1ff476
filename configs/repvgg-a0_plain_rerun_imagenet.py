# RepVGG-A0 of plain convolutions and norms (`-t base` of OREPA's code) on
# ImageNet, trained as OREPA's.
_base_ = ['./_base_/repvgg_a0.py', './_base_/imagenet_orepa.py']

model = dict(backbone=dict(type='mmpretrain.PlainRepVGG'))
