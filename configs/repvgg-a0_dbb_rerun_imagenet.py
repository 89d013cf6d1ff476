# RepVGG-A0 with Diverse Branch Blocks (arXiv:2103.13425) in place of
# its own, trained as it; they have neither an identity branch nor a custom L2.
_base_ = ['./_base_/repvgg_a0.py', './_base_/imagenet_orepa.py']

model = dict(backbone=dict(block=dict(type='DBB')))
