# RepVGG-A0 with OREPA's block of an identity, a composed 3x3 and a 1x1
# (`-t OREPA_VGG` of its code) on ImageNet (arXiv:2204.00826). No custom L2;
# blocks_repvgg.py: "Not used for OREPA". Its kernels are decayed.
_base_ = ['./_base_/repvgg_a0.py', './_base_/imagenet_orepa.py']

model = dict(backbone=dict(block=dict(type='OREPARepVGG')))

# `rbr_identity` is in no rule of the code, though it is a norm.
optim_wrapper = dict(paramwise_cfg=dict(identity_decay_mult=1.0))
