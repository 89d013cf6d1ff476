# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train networks on with frozen norms: which learning rate do blocks bear?

    python docs/figures/frozen_norms.py --data-root data/fashion_mnist

The network is the study's plain stack of 3x3 convolutions, trained on 30
images of each class of Fashion-MNIST. It trains on for 20 epochs, with norms
that train and with norms that are frozen: from a plain network's weights, and
from a network that was trained with the same block.
"""

import argparse
import copy
import functools
import itertools
import logging
import math
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

from workshop.study.images import (  # noqa: E402
    read_fashion_mnist,
    split_for,
)
from workshop.study.networks import start_with  # noqa: E402
from workshop.study.training import Recipe, merged, top1, train  # noqa: E402
from workshop.study.variants import BLOCKS, PLAIN  # noqa: E402

from mmdbb import load_plain_weights_  # noqa: E402

NETWORK, WIDTH, IMAGES, BATCH = 'RepVGG', 8, 30, 50
NAMES = (PLAIN, 'RepVGGConv', 'ACB', 'DBB', 'OREPA')
#: Values of branch_scale, of starts from plain weights.
SHARES = (0.1, 1.0)
FIRST = Recipe(0.1, 40, BATCH)
RATES = (0.03, 0.01, 0.003)
EPOCHS = 20


def freeze_norms(network):
    """As norm_eval=True does it: train() leaves the norms in eval mode."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
        norm.train = lambda mode=True: None
    return norms


def trained_on(network, data, rate, seed, frozen):
    """Accuracy after more epochs, per cent."""
    network = copy.deepcopy(network)
    norms = freeze_norms(network) if frozen else []
    train(network, data.train, Recipe(rate, EPOCHS, BATCH), seed)
    for norm in norms:
        del norm.train
    values = network.state_dict().values()
    if not all(value.isfinite().all() for value in values):
        return math.nan
    return top1(merged(network), data.test)


def starts(data, seed):
    """The networks to train on: where from, the block, and a function."""
    built = functools.partial(start_with, NETWORK, width=WIDTH, seed=seed)
    plain = built(BLOCKS[PLAIN].config)
    train(plain, data.train, FIRST, seed)
    yield 'plain weights', PLAIN, plain
    for name, share in itertools.product(NAMES[1:], SHARES):
        network = built(BLOCKS[name].config)
        load_plain_weights_(network, plain.state_dict(), branch_scale=share)
        # OREPA has no such branches.
        if name != 'OREPA' or share == SHARES[0]:
            yield f'plain weights, {share:g}', name, network
    for name in NAMES[1:]:
        network = built(BLOCKS[name].config)
        train(network, data.train, FIRST, seed)
        yield 'its own training', name, network


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data-root', default='data/fashion_mnist')
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    images = read_fashion_mnist(args.data_root)
    found = {}
    for seed in range(args.seeds):
        data = split_for(images, IMAGES, seed, False)
        for where, name, network in starts(data, seed):
            for frozen in (False, True):
                tops = [
                    trained_on(network, data, rate, seed, frozen)
                    for rate in RATES
                ]
                row = [top1(merged(network), data.test), *tops]
                found.setdefault((where, name, frozen), []).append(row)
                print(seed, where, name, frozen, row, flush=True)
    print(f'| from | block | norms | start | {" | ".join(map(str, RATES))} |')
    for (where, name, frozen), rows in found.items():
        means = [sum(column) / len(column) for column in zip(*rows)]
        norms = 'frozen' if frozen else 'trained'
        cells = ' | '.join(f'{mean:.1f}' for mean in means)
        print(f'| {where} | {name} | {norms} | {cells} |')


if __name__ == '__main__':
    main()
