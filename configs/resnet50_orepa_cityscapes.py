# PSPNet on Cityscapes, 40k iterations, with a ResNet-50-OREPA backbone
# (arXiv:2204.00826), in mmseg's recipe.
_base_ = './resnet50_dbb_cityscapes.py'

model = dict(
    backbone=dict(
        # The stem of the paper's ImageNet weights, 7x7, not mmseg's deep one.
        type='mmpretrain.ResNetDBB',
        block=dict(type='OREPA'),
        # From scratch. To start from the paper's ImageNet weights, convert
        # them (tools/convert_official.py), or ours:
        # init_cfg=dict(
        #     type='Pretrained',
        #     checkpoint='work_dirs/resnet50_orepa_imagenet/epoch_120.pth',
        #     prefix='backbone.',
        # ),
    ),
)

# OREPA's authors advise to tune the stem's learning rate where training
# starts from their ImageNet weights: its composed weights are distributed
# unlike a plain stem's. They name no value; 1.0 is no change.
optim_wrapper = dict(
    constructor='ReparamOptimWrapperConstructor',
    paramwise_cfg=dict(stem_lr_mult=1.0),
)
