"""The demo's configs with tiny data and networks, for the tools' tests."""

from pathlib import Path

import torch
from helpers import randomize
from mmengine.config import Config
from torch.nn.modules.batchnorm import _BatchNorm
from workshop.demo.prepare import prepare

import mmdbb
from mmdbb.mm.deploy.load import build_model

CONFIGS = Path(mmdbb.__file__).parents[1] / 'configs' / 'demo'
#: Config, images to train and to validate on, and their size.
TASKS = dict(
    classification=('resnet18_dbb_mnist5k.py', (40, 20), (32, 32)),
    detection=('resnet18_dbb_digits_coco.py', (8, 4), (96, 96)),
    segmentation=('resnet18_dbb_digits_cityscapes.py', (8, 4), (64, 128)),
)


def tiny_config(task, root):
    """A config of a network of two stages, and its data under ``root``."""
    name, (train, val), _ = TASKS[task]
    folder = prepare(task, root, train=train, val=val)
    cfg = Config.fromfile(CONFIGS / name)
    narrow = dict(
        base_channels=8,
        stem_channels=8,
        num_stages=2,
        dilations=(1, 1),
        strides=(1, 2),
        out_indices=(1,) if task == 'classification' else (0, 1),
    )
    cfg.model.backbone.update(narrow)
    if task == 'classification':
        cfg.model.head.in_channels = 16
    else:
        cfg.model.neck.update(in_channels=[8, 16], out_channels=8, num_outs=2)
    if task == 'detection':
        head = cfg.model.bbox_head
        head.update(in_channels=8, feat_channels=8, stacked_convs=1)
        head.norm_cfg.num_groups = 2
        head.anchor_generator.strides = [8, 16]
        inside = 'annotations/instances_val2017.json'
        cfg.test_evaluator.ann_file = str(folder / inside)
        cfg.val_evaluator.ann_file = str(folder / inside)
    if task == 'segmentation':
        cfg.model.decode_head.update(
            in_channels=[8, 8], in_index=[0, 1], channels=8
        )
        cfg.model.decode_head.feature_strides = [4, 8]
    for part in ('train', 'val', 'test'):
        loader = cfg[f'{part}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=4)
        loader.dataset.data_root = f'{folder}/'
    cfg.work_dir = str(root / 'work')
    cfg.log_level = 'ERROR'
    return cfg


def tame(model, seed=0):
    """Random norms whose scales do not vanish, as a training leaves them."""
    randomize(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.weight.abs_().clamp_(min=0.3)
    return model


def tiny_checkpoint(cfg, path):
    """Random weights and norms, as after a training."""
    model = tame(build_model(cfg))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(epoch=1)), path)
    return str(path)
