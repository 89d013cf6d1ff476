# The baseline of unireplknet-t_dilated_imagenet.py: the same network of plain
# 13x13 kernels, trained in the same way.
_base_ = './unireplknet-t_dilated_imagenet.py'

model = dict(backbone=dict(type='mmpretrain.PlainUniRepLKNet'))
