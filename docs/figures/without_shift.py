# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train a network with group norms: plain, DBB, DBB without shift, OREPA.

    python docs/figures/without_shift.py --seeds 4

The network is the demo's, on 30 digits of each class, but the backbone is
mmpretrain's ResNet with group norms and conv_cfg. A DBB cannot become the
stock network there, with shift=False it can.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

from workshop.demo.prepare import prepare  # noqa: E402
from workshop.study.report import interval  # noqa: E402

IMAGES, EPOCHS, BATCH, RATE = 30, 40, 50, 3e-3
METRIC = 'val/accuracy/top1'
START = dict(type='TorchDefault')
CONV_CFGS = {
    'plain': None,
    'DBB': dict(type='DBB'),
    'DBB, shift=False': dict(type='DBB', shift=False),
    'OREPA': dict(type='OREPA', min_kernel_size=2),
}


def config_of(name, folder, seed):
    """The demo's config, with group norms and a block by conv_cfg."""
    cfg = Config.fromfile(ROOT / 'configs/demo/resnet18_dbb_mnist5k.py')
    backbone = cfg.model.backbone
    backbone.pop('block', None)
    backbone.update(
        type='mmpretrain.ResNet',
        conv_cfg=CONV_CFGS[name],
        norm_cfg=dict(type='GN', num_groups=8),
        zero_init_residual=False,
        init_cfg=dict(START),
    )
    cfg.model.head.init_cfg = dict(START)
    cfg.optim_wrapper.optimizer.lr = RATE
    loaders = (cfg.train_dataloader, cfg.val_dataloader)
    for loader in loaders:
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(folder)
    cfg.train_dataloader.batch_size = BATCH
    cfg.train_dataloader.dataset.indices = chosen_images(folder, seed)
    cfg.param_scheduler[-1].T_max = EPOCHS
    cfg.train_cfg = dict(by_epoch=True, max_epochs=EPOCHS, val_interval=EPOCHS)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=-1)
    cfg.log_level = 'WARNING'
    cfg.randomness = dict(seed=seed)
    cfg.experiment_name = f'{name}_{seed}_{os.getpid()}'
    for part in ('dataloader', 'cfg', 'evaluator'):
        cfg.pop(f'test_{part}')
    return cfg


def chosen_images(folder, seed):
    """Places of some training images of each class."""
    folders = sorted(p for p in (folder / 'train').iterdir() if p.is_dir())
    random = np.random.default_rng(seed)
    chosen, start = [], 0
    for each in folders:
        count = sum(1 for _ in each.iterdir())
        places = random.choice(count, IMAGES, replace=False)
        chosen += sorted(int(start + place) for place in places)
        start += count
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=4)
    parser.add_argument('--data-root', default='data')
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = prepare('classification', args.data_root, 0)
    tops = {name: [] for name in CONV_CFGS}
    with tempfile.TemporaryDirectory() as work_dir:
        for seed in range(args.seeds):
            for name in CONV_CFGS:
                cfg = config_of(name, folder, seed)
                cfg.work_dir = str(Path(work_dir, f'{name}_{seed}'))
                runner = Runner.from_cfg(cfg)
                runner.train()
                top1 = runner.message_hub.get_scalar(METRIC).current()
                tops[name].append(top1)
                print(f'{name}, seed {seed}: {top1:.1f}', flush=True)
    for name, values in tops.items():
        print(f'{name}: {interval(values).text()}')


if __name__ == '__main__':
    main()
