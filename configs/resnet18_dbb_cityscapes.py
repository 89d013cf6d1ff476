# PSPNet on Cityscapes with a ResNet-18-DBB backbone: the segmentor that the
# DBB paper (arXiv:2103.13425) shows generalization with, in mmseg's recipe.
# Both start from 0.01 and follow a polynomial of power 0.9; mmseg's 80k
# iterations of 8 images are 215 epochs, the paper trains for 200.
# Starts from one's own ImageNet run; other starts stand in docs/recipes.md.
_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    # Of mmseg's plain network; the backbone's init_cfg takes its place.
    pretrained=None,
    backbone=dict(
        _delete_=True,
        # With the papers' stem, 7x7, which their weights fit. mmseg's has
        # three layers: `_from_plain` has it, with mmseg's weights.
        type='mmpretrain.ResNetDBB',
        depth=18,
        out_indices=(0, 1, 2, 3),
        # mmseg's geometry for an output stride of 8 pixels
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        init_cfg=dict(
            type='BackbonePretrained',
            checkpoint='work_dirs/resnet18_dbb_imagenet/epoch_120.pth',
        ),
    ),
)
