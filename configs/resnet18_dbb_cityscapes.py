# PSPNet on Cityscapes with a ResNet-18-DBB backbone: the segmentor that the
# DBB paper (arXiv:2103.13425) shows generalization with, in mmseg's recipe.
# Both start from 0.01 and follow a polynomial of power 0.9; mmseg's 80k
# iterations of 8 images are 215 epochs, the paper trains for 200.
_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    # v1c weights are a plain network's and do not fit.
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ResNetV1cDBB',
        depth=18,
        out_indices=(0, 1, 2, 3),
        # mmseg's geometry for an output stride of 8 pixels
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        # From scratch, and none of it frozen. To start from an ImageNet
        # checkpoint of ours instead (resnet18_dbb_imagenet.py with the
        # backbone ResNetV1cDBB):
        # init_cfg=dict(
        #     type='Pretrained',
        #     checkpoint='work_dirs/resnetv1c18_dbb_imagenet/epoch_120.pth',
        #     prefix='backbone.',
        # ),
    ),
)
