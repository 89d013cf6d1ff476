# PSPNet on Cityscapes, 40k iterations, with a ResNet-50-DBB backbone.
_base_ = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)

model = dict(
    # v1c weights are a plain network's and do not fit.
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ResNetV1cDBB',
        depth=50,
        out_indices=(0, 1, 2, 3),
        # mmseg's geometry for an output stride of 8 pixels
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        # From scratch, and none of it frozen. To start from an ImageNet
        # checkpoint of ours instead (resnet50_dbb_imagenet.py with the
        # backbone ResNetV1cDBB):
        # init_cfg=dict(
        #     type='Pretrained',
        #     checkpoint='work_dirs/resnetv1c50_dbb_imagenet/epoch_120.pth',
        #     prefix='backbone.',
        # ),
    ),
)
