# How the DBB paper (arXiv:2103.13425) trains on ImageNet. The numbers are
# those of its code, github.com/DingXiaoH/DiverseBranchBlock: `train.py`
# (defaults) and, for images, `utils.py` (`standard_train_preprocess`: crop
# and flip only).
_base_ = './imagenet.py'

train_dataloader = dict(drop_last=True)  # train.py
# train.py: cosine to zero, stepped every iteration, no warm-up
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=120,
    eta_min=0.0,
    by_epoch=True,
    convert_to_iter_based=True,
)
