# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What a block costs beside conv and BN, by the dimensions of its images.

  python docs/figures/dimensions.py

times one training step of each form, on one thread, by processor time, the
smallest of several runs; and adds up the tensors that autograd keeps for the
backward pass. It also runs the branches one by one.
"""

import contextlib
import time

import torch
from torch import nn

from mmdbb.blocks import (
    DBB,
    ACB3d,
    DBB1d,
    DBB3d,
    DBBTranspose2d,
    OREPAConv3d,
    RepVGGConv3d,
)
from mmdbb.reparam import literal_forward

RUNS = 5
#: What is measured, and the shape of its batch.
CASES = (
    ('1d, 3 taps', nn.Conv1d, nn.BatchNorm1d, [DBB1d], (8, 64, 2048)),
    ('2d, 3x3', nn.Conv2d, nn.BatchNorm2d, [DBB], (8, 64, 48, 48)),
    (
        '3d, 3x3x3',
        nn.Conv3d,
        nn.BatchNorm3d,
        [DBB3d, ACB3d, RepVGGConv3d, OREPAConv3d],
        (2, 64, 8, 28, 28),
    ),
    (
        'transposed 2d, 4x4',
        nn.ConvTranspose2d,
        nn.BatchNorm2d,
        [DBBTranspose2d],
        (4, 64, 28, 28),
    ),
)


def step(layer, x):
    """Seconds of processor time and MB kept, of one training step."""
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() != x.data_ptr():
            size = tensor.numel() * tensor.element_size()
            kept[tensor.data_ptr()] = size
        return tensor

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    y.sum().backward()
    return time.process_time() - start, sum(kept.values()) / 1e6


def cost(layer, x):
    steps = [step(layer, x) for _ in range(RUNS)]
    return min(seconds for seconds, _ in steps), steps[-1][1]


def main():
    torch.set_num_threads(1)
    print('layer, block, time and memory beside conv and BN')
    for name, conv, norm, blocks, shape in CASES:
        geometry = dict(kernel_size=3, padding=1)
        if conv is nn.ConvTranspose2d:
            geometry = dict(kernel_size=4, stride=2, padding=1)
        x = torch.rand(shape).requires_grad_()
        width = shape[1]
        plain = conv(width, width, **geometry, bias=False)
        seconds, kept = cost(nn.Sequential(plain, norm(width)), x)
        for kind in blocks:
            block = kind(width, width, **geometry)
            own = nn.Sequential(block)
            if kind is OREPAConv3d:
                own.append(norm(width))
            ways = dict(own=contextlib.nullcontext)
            if kind in (DBB1d, DBB, DBB3d):
                ways['one by one'] = lambda own=own: literal_forward(own)
            for way, context in ways.items():
                with context():
                    time_, memory = cost(own, x)
                print(
                    f'{name}, {kind.__name__} ({way}): '
                    f'{time_ / seconds:.1f}, {memory / kept:.1f} '
                    f'(conv and BN {1000 * seconds:.0f} ms, {kept:.0f} MB)'
                )


if __name__ == '__main__':
    main()
