# PSPNet on Cityscapes, 40k iterations, on mmseg's own ResNet-50 with DBB
# as its convolution: mmseg's norms stay behind the blocks. The heads take the
# same conv_cfg.
_base_ = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmdbb'], allow_failed_imports=False)

model = dict(
    # v1c weights are a plain network's and do not fit.
    pretrained=None,
    backbone=dict(
        conv_cfg=dict(type='DBB'),
        # From scratch. To start from a checkpoint of ours instead:
        # init_cfg=dict(
        #     type='Pretrained',
        #     checkpoint='work_dirs/.../epoch_120.pth',
        #     prefix='backbone.',
        # ),
    ),
)
