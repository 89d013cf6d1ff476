# RepVGG-B1, otherwise as RepVGG-A0.
_base_ = './repvgg-a0_repvgg_rerun_imagenet.py'

model = dict(
    backbone=dict(arch='B1'),
    head=dict(in_channels=2048),
)
