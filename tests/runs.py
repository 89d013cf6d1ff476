"""Runs of mmengine's Runner on a tiny network with blocks."""

import os
import random
import signal
import sys

import numpy as np
import torch
from helpers import run_tool
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, METRICS
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from networks import CLASSIFIER
from torch.utils.data import Dataset


@DATASETS.register_module(name='NoiseOfTests', force=True)
class Noise(Dataset):
    """Images that are drawn anew each time, by all three generators."""

    def __init__(self, length=4):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = torch.randint(0, 200, (3, 24, 32))
        image = image + random.randrange(20) + np.random.randint(20)
        sample = DataSample().set_gt_label(index % 3)
        return dict(inputs=image.to(torch.uint8), data_samples=sample)


@METRICS.register_module(name='ScriptOfTests', force=True)
class Script(BaseMetric):
    """Scores as written down beforehand, one each time."""

    def __init__(self, scores):
        super().__init__()
        self.scores = list(scores)

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        score = self.scores.pop(0)
        return dict(good=score, other=-score)


def run_config(work_dir, scores=(1.0, 2.0), **changes):
    """The config of a run that validates as often as there are scores."""
    cfg = Config.fromstring(CLASSIFIER, '.py')
    loader = dict(
        batch_size=2,
        num_workers=0,
        dataset=dict(type='NoiseOfTests'),
        sampler=dict(type='DefaultSampler', shuffle=True),
    )
    cfg.merge_from_dict(
        dict(
            work_dir=str(work_dir),
            experiment_name=f'{work_dir.parent.name}-{work_dir.name}',
            train_dataloader=loader,
            val_dataloader=loader,
            val_evaluator=dict(type='ScriptOfTests', scores=list(scores)),
            train_cfg=dict(by_epoch=True, max_epochs=len(scores)),
            val_cfg=dict(),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
            ),
            param_scheduler=dict(type='MultiStepLR', milestones=[1]),
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook',
                    interval=1,
                    save_best='good',
                    rule='greater',
                    max_keep_ckpts=1,
                )
            ),
            custom_hooks=[dict(type='EMAHook', momentum=0.3)],
            randomness=dict(seed=0),
            log_level='WARNING',
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


def train_and_exit(*arguments):
    """Run `tools/train.py`, in a process of its own."""
    sys.exit(run_tool('train', *arguments))


def train(cfg):
    """Train from a config; returns the runner."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@HOOKS.register_module(name='KilledOfTests', force=True)
class Killed(Hook):
    """Adds noise to the weights; kills the process after some iterations."""

    priority = 'HIGHEST'

    def __init__(self, after=None):
        self.after = after

    @torch.no_grad()
    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        for parameter in runner.model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
        if runner.iter + 1 == self.after:
            os.kill(os.getpid(), signal.SIGKILL)
