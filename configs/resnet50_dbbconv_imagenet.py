# The stock ResNet-50 with DBB as its convolution: `conv_cfg` replaces the
# convolutions only, so mmpretrain's norms stay behind the blocks. Trained as
# ResNet-50-DBB is.
_base_ = './resnet50_dbb_imagenet.py'
custom_imports = dict(imports=['mmdbb'])

model = dict(backbone=dict(type='ResNet', conv_cfg=dict(type='DBB')))
