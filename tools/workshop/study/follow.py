# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What a trained network keeps when it is quantized, pruned or cut down.

Each function takes a trained network that is not merged, and gives the
accuracy of what it makes of it. The network itself stays as it is. All blocks
are treated alike: what is trained further after pruning is trained with one
recipe, what is trained with rounding with the best of the same three rates.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Callable, Dict, NamedTuple, Union

import torch
from torch import Tensor, nn

from mmdbb.insert import merge_into_
from mmdbb.mm.evaluation.norm_statistics import calibrate_norms_
from mmdbb.mm.pruning.structure import cost_of, prune_
from mmdbb.mm.quantization.fake import (
    freeze_ranges_,
    quantizers,
    set_quantizing_,
)
from mmdbb.mm.quantization.insert_bn import insert_bn_
from mmdbb.mm.quantization.qat import prepare_qat_
from mmdbb.modules import in_eval_mode
from mmdbb.reparam import find_blocks
from workshop.study.drop import ROLES as DROPS
from workshop.study.drop import Left
from workshop.study.images import FashionMNIST, Images
from workshop.study.training import Machine, Recipe, merged, top1, train

IMAGE_SIZE = (28, 28)
#: Training images that ranges and norms are calibrated with.
CALIBRATION = 300
#: How a network is trained further; with rounding, the rate is another.
FURTHER = Recipe(lr=0.01, epochs=10, batch=50)
#: Rates of quantization-aware training, of which the best is taken.
QAT_RATES = (0.01, 0.001, 0.0001)


class Trained(NamedTuple):
    """A trained network and what it was trained with.

    Attributes:
        network: The network, not merged.
        rebuilt: Builds it anew with another block's config, to be filled.
        data: Images to train and to test on.
        held_out: Images to choose a rate of training further on.
        seed: Of what is trained further.
        machine: Where to train.
    """

    network: nn.Module
    rebuilt: Callable[[dict], nn.Module]
    data: FashionMNIST
    held_out: Images
    seed: int
    machine: Machine

    @property
    def calibration(self) -> Tensor:
        """Some training images, of all classes."""
        images = self.data.train.images
        return images[:: max(1, len(images) // CALIBRATION)]

    def train_on(self, network: nn.Module, lr: float = FURTHER.lr) -> None:
        """Train something made of the network further, in place."""
        recipe = FURTHER._replace(lr=lr)
        train(network, self.data.train, recipe, self.seed, self.machine)


def as_float(trained: Trained) -> float:
    """The merged network, as it is."""
    return top1(merged(trained.network), trained.data.test)


def after_training(trained: Trained, per_channel: bool) -> float:
    """The plain form with weights and activations rounded to eight bits."""
    network = plain_form(trained)
    # One batch decides the ranges.
    prepare_qat_(network, IMAGE_SIZE, 1.0, per_channel)
    return _calibrated(network, trained)


def after_qat(trained: Trained, per_channel: bool) -> float:
    """Trained further with its equivalent kernels rounded.

    The norms are frozen then, so blocks bear other rates than they were
    trained with. The best rate on held-out images counts.
    """
    networks = []
    for lr in QAT_RATES:
        network = copy.deepcopy(trained.network)
        prepare_qat_(network, IMAGE_SIZE, 0.1, per_channel)
        set_quantizing_(network)
        trained.train_on(network, lr)
        networks.append(network)
    best = max(networks, key=lambda each: top1(each, trained.held_out))
    return top1(best, trained.data.test)


def after_inserted_norms(trained: Trained, per_channel: bool) -> float:
    """Merged, given a norm behind each convolution; then as above.

    A plain network has such norms, so nothing is inserted there.
    """
    if not find_blocks(trained.network):
        return after_qat(trained, per_channel)
    network = trained.rebuilt(dict(type='ConvBN'))
    with in_eval_mode(trained.network):
        insert_bn_(network, trained.network, trained.calibration)
    return after_qat(trained._replace(network=network), per_channel)


def after_pruning(trained: Trained, saved: float) -> float:
    """The plain form with fewer filters, trained further.

    Args:
        trained: The network.
        saved: Share of the FLOPs that pruning saves at least.
    """
    plain = plain_form(trained)
    with in_eval_mode(plain):
        calibrate_norms_(plain, trained.calibration)
    network = pruned_to(plain, 1 - saved)
    trained.train_on(network)
    return top1(network, trained.data.test)


def pruned_to(network: nn.Module, share: float) -> nn.Module:
    """Prune a copy until it needs at most a share of the FLOPs.

    Args:
        network: A plain network; unchanged.
        share: Of its FLOPs.
    """
    whole = cost_of(network, IMAGE_SIZE).flops
    low, high, best = 0.0, 1.0, None
    while high - low > 1 / 64:
        ratio = (low + high) / 2
        candidate = copy.deepcopy(network)
        prune_(candidate, ratio, IMAGE_SIZE)
        if cost_of(candidate, IMAGE_SIZE).flops > share * whole:
            low = ratio
        else:
            high, best = ratio, candidate
    if best is None:
        raise ValueError(f'cannot prune to {share:.0%} of the FLOPs')
    return best


def plain_form(trained: Trained) -> nn.Module:
    """The plain network, norms included, that the trained one equals."""
    if not find_blocks(trained.network):
        return copy.deepcopy(trained.network)
    plain = trained.rebuilt(dict(type='Conv2d'))
    with in_eval_mode(trained.network):
        merge_into_(plain, trained.network, trained.calibration[:2])
    return plain


def _calibrated(network: nn.Module, trained: Trained) -> float:
    set_quantizing_(network)
    with in_eval_mode(network), torch.no_grad():
        for quantizer in quantizers(network):
            quantizer.train()  # takes the range of what it sees
        network(trained.calibration)
        freeze_ranges_(network)
    return top1(network, trained.data.test)


FollowUp = Callable[[Trained], Union[float, Left]]

#: Part of the study -> role of a row -> what is done; nothing comes first. No
#: two parts share a role, because each compares rows of one network.
FOLLOW_UPS: Dict[str, Dict[str, FollowUp]] = {
    'int8': {
        'float': as_float,
        'INT8 per channel': partial(after_training, per_channel=True),
        'INT8 per tensor': partial(after_training, per_channel=False),
        'QAT per channel': partial(after_qat, per_channel=True),
        'QAT per tensor': partial(after_qat, per_channel=False),
        'norms inserted, QAT per tensor': partial(
            after_inserted_norms, per_channel=False
        ),
    },
    'pruning': {
        'unpruned': as_float,
        '50 % fewer FLOPs': partial(after_pruning, saved=0.5),
        '70 % fewer FLOPs': partial(after_pruning, saved=0.7),
    },
    'drop': DROPS,
}
