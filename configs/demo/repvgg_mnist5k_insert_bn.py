"""The narrow RepVGG, merged, with a norm behind each convolution again.

Starts from what `tools/quantize.py ... --insert-bn` writes of the trained one.
"""

_base_ = './_base_/repvgg_mnist5k_short.py'

model = dict(backbone=dict(block=dict(type='ConvBN')))

load_from = 'work_dirs/repvgg_mnist5k/insert_bn.pth'
