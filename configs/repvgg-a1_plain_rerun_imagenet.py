# RepVGG-A1, otherwise as RepVGG-A0.
_base_ = './repvgg-a0_plain_rerun_imagenet.py'

model = dict(backbone=dict(arch='A1'))
