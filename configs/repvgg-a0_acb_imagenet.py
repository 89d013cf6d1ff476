# RepVGG-A0 with Asymmetric Convolution Blocks (arXiv:1908.03930) in place of
# its own, trained as it.
_base_ = './repvgg-a0_repvgg_imagenet.py'

model = dict(backbone=dict(block=dict(type='ACB')))

# The blocks have neither an identity branch nor a custom L2.
optim_wrapper = dict(paramwise_cfg=dict(custom_l2=False))
