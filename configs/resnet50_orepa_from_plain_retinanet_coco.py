# RetinaNet with FPN on COCO, 1x, with a ResNet-50-OREPA backbone that starts
# as the plain ImageNet ResNet-50 that mmdet starts from. The stem stays plain:
# a stack of kernels cannot start as any kernel there is.
_base_ = './resnet50_dbb_from_plain_retinanet_coco.py'

model = dict(backbone=dict(block=dict(type='OREPA', max_kernel_size=6)))
