"""Handwritten digits (MNIST-5k) with a narrow RepVGG.

Its identity branches are shortcuts in training only: merged, the network has
none. Of all networks here it loses most when quantized to eight bits after
merging, see docs/quantization.md.
The data come from `tools/prepare_demo_data.py --task classification`.
"""

_base_ = './resnet18_dbb_mnist5k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ReparamRepVGG',
        block=dict(type='RepVGGConv'),
        arch=dict(
            num_blocks=[2, 4, 14, 1],  # as deep as RepVGG-A0
            width_factor=[0.125, 0.125, 0.125, 0.25],  # 8 to 128 channels
            group_layer_map=None,
            se_cfg=None,
        ),
    ),
)
