# PSPNet on Cityscapes, 40k iterations, on mmseg's own ResNet-50 with DBB
# as its convolution: mmseg's norms stay behind the blocks. The heads take the
# same conv_cfg.
# Starts from one's own ImageNet run; other starts stand in docs/recipes.md.
_base_ = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmdbb'], allow_failed_imports=False)

model = dict(
    # Of mmseg's plain network; the backbone's init_cfg takes its place.
    pretrained=None,
    backbone=dict(
        type='ResNet',  # with the stem of that run, 7x7
        conv_cfg=dict(type='DBB'),
        init_cfg=dict(
            type='BackbonePretrained',
            checkpoint=(
                'work_dirs/resnet50_dbbconv_rerun_imagenet/epoch_120.pth'
            ),
        ),
    ),
)
