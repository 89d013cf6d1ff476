# How the OREPA paper (arXiv:2204.00826) trains on ImageNet, whatever the
# block. The numbers are those of its code, github.com/JUGGHM/OREPA_CVPR2022:
# `train.py` (defaults) and, for images, `utils.py` (crop and flip only).
_base_ = './imagenet.py'

# train.py, sgd_optimizer: 'bias' and 'bn' in its name. What has 'prior' in
# its name is not decayed either, but that is the fixed filter, a buffer.
optim_wrapper = dict(
    paramwise_cfg=dict(bias_decay_mult=0.0, norm_decay_mult=0.0),
)
# train.py, DistributedDataParallel as torch has it: the norms' statistics are
# those of the first GPU, in evaluation too
model_wrapper_cfg = dict(
    type='MMDistributedDataParallel', broadcast_buffers=True
)
param_scheduler = [
    # Five epochs, as the paper says; its code's scheduler counts iterations,
    # and so warms up for five of them (`warmup=args.epochs/24`).
    dict(
        type='LinearLR',
        start_factor=1e-3,  # from zero in the code, which mmengine cannot
        begin=0,
        end=5,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=115,
        eta_min=0.0,
        begin=5,
        end=120,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
