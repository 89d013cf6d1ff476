# VGG-16 on CIFAR-100, trained as on CIFAR-10 (`create_vh` of the ACNet code's
# `base_model/vgg.py`).
_base_ = './cifar10_acnet.py'

data_preprocessor = dict(num_classes=100)
train_dataloader = dict(
    dataset=dict(type='CIFAR100', data_root='data/cifar100')
)
val_dataloader = dict(dataset=dict(type='CIFAR100', data_root='data/cifar100'))
test_dataloader = dict(
    dataset=dict(type='CIFAR100', data_root='data/cifar100')
)
model = dict(head=dict(num_classes=100))
