# RepVGG-A0 with OREPA's block of an identity, a composed 3x3 and a 1x1
# (`-t OREPA_VGG` of its code) on ImageNet (arXiv:2204.00826).
_base_ = './repvgg-a0_repvgg_imagenet.py'

model = dict(backbone=dict(block=dict(type='OREPARepVGG')))

optim_wrapper = dict(
    paramwise_cfg=dict(
        # blocks_repvgg.py: "Not used for OREPA"; its kernels are decayed.
        custom_l2=False,
    ),
)
