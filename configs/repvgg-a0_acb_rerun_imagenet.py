# RepVGG-A0 with Asymmetric Convolution Blocks (arXiv:1908.03930) in place of
# its own, trained as it; they have neither an identity branch nor a custom L2.
_base_ = ['./_base_/repvgg_a0.py', './_base_/imagenet_orepa.py']

model = dict(backbone=dict(block=dict(type='ACB')))
