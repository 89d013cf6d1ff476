# PSPNet on Cityscapes with a ResNet-18-DBB backbone, from scratch: with the
# schedule of mmseg's only networks that train so, its MobileNetV3s
# (mobilenet-v3-d8-scratch_lraspp_4xb4-320k): 320k iterations of 16 images.
_base_ = './resnet18_dbb_cityscapes.py'

model = dict(
    backbone=dict(
        # As the ImageNet recipes: baseline and blocks start alike.
        zero_init_residual=False,
        init_cfg=dict(_delete_=True, type='TorchDefault'),
    ),
)

train_dataloader = dict(batch_size=4)
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1e-4,
        power=0.9,
        begin=0,
        end=320000,
        by_epoch=False,
    ),
]
train_cfg = dict(max_iters=320000, val_interval=32000)
default_hooks = dict(checkpoint=dict(interval=32000))
