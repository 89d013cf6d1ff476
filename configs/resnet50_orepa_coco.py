# Faster R-CNN with FPN on COCO, 1x, with a ResNet-50-OREPA backbone
# (arXiv:2204.00826), in mmdet's recipe.
# Starts from one's own ImageNet run; other starts stand in docs/recipes.md.
_base_ = './resnet50_dbb_coco.py'

model = dict(
    backbone=dict(
        block=dict(type='OREPA'),
        # mmdet's 1 would freeze the stem, which is to be trained; see below.
        frozen_stages=-1,
        init_cfg=dict(
            checkpoint='work_dirs/resnet50_orepa_imagenet/epoch_120.pth',
        ),
    ),
)

# OREPA's authors advise to tune the stem's learning rate where training
# starts from ImageNet weights: its composed weights are distributed unlike a
# plain stem's. They name no value; 1.0 is no change.
optim_wrapper = dict(
    constructor='ReparamOptimWrapperConstructor',
    paramwise_cfg=dict(stem_lr_mult=1.0),
)
