# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train a network with group norms: plain, DBB, DBB without shift, OREPA.

    python docs/figures/without_shift.py --seeds 4

The network, data and budget are those of tools/study.py, but the backbone is
mmpretrain's ResNet with group norms and conv_cfg. A DBB cannot become the
stock network there, with shift=False it can.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

from workshop.demo.prepare import prepare  # noqa: E402
from workshop.demo.study import (  # noqa: E402
    Budget,
    Result,
    print_study,
    study_config,
    train_network,
)

CONV_CFGS = {
    'plain': None,
    'DBB': dict(type='DBB'),
    'DBB, shift=False': dict(type='DBB', shift=False),
    'OREPA': dict(type='OREPA', min_kernel_size=2),
}


def config_of(name, folder, seed):
    """The study's config, with group norms and a block by conv_cfg."""
    cfg = study_config(ROOT, folder, 'plain', seed, Budget())
    backbone = cfg.model.backbone
    backbone.pop('block')
    backbone.update(
        type='mmpretrain.ResNet',
        conv_cfg=CONV_CFGS[name],
        norm_cfg=dict(type='GN', num_groups=8),
        zero_init_residual=False,
    )
    cfg.experiment_name = f'{name}_{cfg.experiment_name}'
    return cfg


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=4)
    parser.add_argument('--data-root', default='data')
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = prepare('classification', args.data_root, 0)
    results = []
    with tempfile.TemporaryDirectory() as work_dir:
        for seed in range(args.seeds):
            for name in CONV_CFGS:
                cfg = config_of(name, folder, seed)
                cfg.work_dir = str(Path(work_dir, f'{name}_{seed}'))
                top1 = train_network(cfg)
                results.append(Result(name, seed, top1))
                print(f'{name}, seed {seed}: {top1:.1f}', flush=True)
    print_study(results)


if __name__ == '__main__':
    main()
