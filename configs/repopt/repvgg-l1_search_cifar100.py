# RepOptimizer's search for RepOpt-VGG-L1, otherwise as for B1.
_base_ = './repvgg-b1_search_cifar100.py'

# main_repopt.py of the code: deeper than RepVGG's own B1, as wide
arch = dict(
    _delete_=True,
    num_blocks=[8, 14, 24, 1],
    width_factor=[2, 2, 2, 4],
    group_layer_map=None,
    se_cfg=None,
)
later = [
    dict(
        type='LinearAdd',
        only=f'backbone.stage_?.{i}.*',
        scale_init=(2 / i) ** 0.5,
    )
    for i in range(1, 24)
]
model = dict(
    blocks=[*later, dict(type='LinearAdd')],
    backbone=dict(arch=arch),
)
