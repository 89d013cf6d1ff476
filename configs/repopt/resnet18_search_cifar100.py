# RepOptimizer's search for any ResNet: mmpretrain's ResNet-18 on CIFAR-100,
# with DBB's linear branches in the stages. Another depth needs `depth`, and
# the head's `in_channels`; another block stands in `block`. The training is
# that of RepOpt-VGG's search, see repvgg-b1_search_cifar100.py.
_base_ = './repvgg-b1_search_cifar100.py'

start = dict(type='TorchDefault')
model = dict(
    blocks=[
        dict(
            type='LinearAdd',
            block=dict(type='DBB'),
            only='backbone.layer?.*.conv?',
        )
    ],
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        num_stages=4,
        out_indices=(3,),
        style='pytorch',
        zero_init_residual=False,
        init_cfg=start,
    ),
    head=dict(in_channels=512),
)
# DBB has no identity.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            _delete_=True, **{'generator.scales': dict(decay_mult=0.0)}
        )
    )
)
