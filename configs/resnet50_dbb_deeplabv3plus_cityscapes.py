# DeepLabV3+ on Cityscapes, 40k iterations, with a ResNet-50-DBB backbone: a
# baseline of the OREPA paper (arXiv:2204.00826), in mmseg's recipe.
# Starts from one's own ImageNet run; other starts stand in docs/recipes.md.
_base_ = (
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py'
)
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    # Of mmseg's plain network; the backbone's init_cfg takes its place.
    pretrained=None,
    backbone=dict(
        _delete_=True,
        # With the papers' stem, 7x7, which their weights fit. mmseg's has
        # three layers: `_from_plain` has it, with mmseg's weights.
        type='mmpretrain.ResNetDBB',
        depth=50,
        out_indices=(0, 1, 2, 3),
        # mmseg's geometry for an output stride of 8 pixels
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        init_cfg=dict(
            type='BackbonePretrained',
            checkpoint='work_dirs/resnet50_dbb_rerun_imagenet/epoch_120.pth',
        ),
    ),
)
