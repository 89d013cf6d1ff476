# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""How a network is pruned, and its fine-tuning afterwards."""

from __future__ import annotations

import copy
from typing import NamedTuple, Optional

from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from mmdbb.errors import UserError
from mmdbb.mm.engine.data_check import check_data
from mmdbb.mm.engine.launch import apply_training_options, build_runner
from mmdbb.mm.engine.progress import quietly
from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.host_internals import end_workers, replaced


class PruneOptions(NamedTuple):
    """How to prune a network, and how to fine-tune it afterwards.

    Attributes:
        ratio: Share of the filters to remove, between 0 and 1.
        each_layer: True removes this share of every layer; False removes the
            shortest filters of all layers taken together.
        norm: Norm that measures a filter's length: 1 for L1, 2 for L2.
        round_to: If given, the numbers of channels left are multiples of it.
        length: Epochs of fine-tuning, or iterations if the config's training
            counts those; 0 for none. Less than 1 is a share of the config's
            own schedule, and at least one epoch or iteration.
        lr_scale: Start of the learning rate in fine-tuning, as a share of the
            config's; it falls to zero along a cosine.
        amp: Whether to fine-tune in mixed precision.
        auto_scale_lr: Whether to scale the learning rate of fine-tuning to
            the batch size, as ``auto_scale_lr`` of the config says.
        verbose: Whether to print mmengine's log of the fine-tuning, and not
            only how far it is. The log is written into the work folder in
            any case.
        calibration: Images that the running statistics of the merged
            network's norms are computed from.
    """

    ratio: float = 0.3
    each_layer: bool = False
    norm: int = 2
    round_to: Optional[int] = None
    length: float = 0
    lr_scale: float = 0.1
    amp: bool = False
    auto_scale_lr: bool = False
    verbose: bool = False
    calibration: Calibration = Calibration()


def check_fine_tuning(cfg: Config, options: PruneOptions) -> None:
    """Raise early if a config cannot fine-tune as the options ask.

    Args:
        cfg: Config of the first training.
        options: How to fine-tune.

    Raises:
        UserError: If it lacks its training, or data or machine do not fit.
    """
    if not cfg.get('train_cfg') or cfg.get('train_dataloader') is None:
        raise UserError(
            'the config has no train_cfg or no train_dataloader, so the '
            'pruned network cannot be fine-tuned'
        )
    apply_training_options(
        copy.deepcopy(cfg), options.amp, options.auto_scale_lr
    )
    check_data(cfg, ('train_dataloader',))


def train_on_(
    model: nn.Module, stock_cfg: Config, cfg: Config, options: PruneOptions
) -> None:
    """Fine-tune ``model`` with the config's data, loss and optimizer.

    The config cannot build the pruned layers, so ``model`` replaces the
    network that the runner built.

    Args:
        model: The pruned network; changed in place.
        stock_cfg: Config of the stock network, with data, training loop and
            optimizer. Its schedule is replaced by one cosine to zero.
        cfg: Config of the first training; its ``work_dir`` takes the logs.
        options: How to fine-tune.

    Raises:
        UserError: If the config has no ``train_cfg`` or no
            ``train_dataloader``.
    """
    check_fine_tuning(stock_cfg, options)
    stock_cfg = copy.deepcopy(stock_cfg)
    stock_cfg.work_dir = cfg.get('work_dir', 'work_dirs/pruned')
    loop = stock_cfg.train_cfg
    by_epoch = 'max_iters' not in loop
    end = 'max_epochs' if by_epoch else 'max_iters'
    length = options.length
    if length < 1:
        length = max(round(length * loop[end]), 1)
    loop[end] = loop['val_interval'] = length = int(length)
    cosine = dict(type='CosineAnnealingLR', T_max=length, by_epoch=by_epoch)
    if by_epoch:
        cosine['convert_to_iter_based'] = True
    stock_cfg.param_scheduler = [cosine]
    stock_cfg.optim_wrapper.optimizer.lr *= options.lr_scale
    # The caller evaluates and writes the result.
    stock_cfg.val_cfg = stock_cfg.val_dataloader = None
    stock_cfg.val_evaluator = None
    stock_cfg.default_hooks.checkpoint = None
    apply_training_options(stock_cfg, options.amp, options.auto_scale_lr)
    with quietly(not options.verbose):
        runner = build_runner(stock_cfg)
        give_network(runner, model)
        # The runner would overwrite the pruned weights by random ones.
        try:
            with replaced(model, 'init_weights', _nothing):
                runner.train()
        finally:
            end_workers(runner)


def _nothing() -> None:
    """Stand in for ``init_weights``."""


def give_network(runner: Runner, model: nn.Module) -> None:
    """Replace a runner's network.

    Args:
        runner: The runner; changed in place.
        model: The network, which is wrapped as the runner's config asks.
    """
    runner.model = runner.wrap_model(
        runner.cfg.get('model_wrapper_cfg'), model
    )
