# RepVGG-A0 (arXiv:2101.03697) on ImageNet in OREPA's training, which compares
# with it (arXiv:2204.00826). RepVGG's own differs in that it has no warm-up.
_base_ = ['./_base_/repvgg_a0.py', './_base_/imagenet_orepa.py']

model = dict(backbone=dict(block=dict(type='RepVGGConv')))

optim_wrapper = dict(
    paramwise_cfg=dict(
        # `rbr_identity` is in no rule of either code, though it is a norm;
        # RepVGG's README: "it is better to use it in most of the cases"
        identity_decay_mult=1.0,
        # RepVGG's and OREPA's train.py, --custwd
        custom_l2=True,
    ),
)
