"""What the papers' code was given when its results were recorded.

`data/papers.json.xz` has what that code itself computed (DiverseBranchBlock
at 8d2b16b, OREPA at 3ed037b, ACNet at 748fb0c), by its own names:

- `starts`: mean, standard deviation and largest magnitude of each parameter
  of a new network, and the learning rate and weight decay that its optimizer
  gives it;
- `steps`: losses of some training steps of small networks, in float64, and
  the scores in eval mode after them.
"""

import json
import lzma
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).resolve().parent / 'data' / 'papers.json.xz'


def recorded():
    return json.loads(lzma.open(DATA).read())


def values_of(name, shape):
    """Numbers for an entry of a state dict, by its name in the code."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    last = name.rpartition('.')[2]
    if last == 'num_batches_tracked':
        return torch.zeros(shape, dtype=torch.long)
    if last == 'running_var':
        values = random.uniform(0.5, 2, shape)
    elif last == 'weight' and len(shape) == 1:  # of a norm
        values = random.uniform(0.5, 1.5, shape)
    elif len(shape) > 1 and last != 'vector':
        fan_in = np.prod(shape[1:])
        values = random.normal(0, fan_in**-0.5, shape)
    else:
        values = random.normal(0, 0.3, shape)
    return torch.from_numpy(np.asarray(values))


def batches(count):
    """Images (4, 3, 32, 32) and labels of ten classes, for each step."""
    random = np.random.default_rng(1)
    for _ in range(count):
        images = random.normal(0, 1, (4, 3, 32, 32))
        labels = random.integers(10, size=4)
        yield torch.from_numpy(images), torch.from_numpy(labels)
