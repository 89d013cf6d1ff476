"""Record the vectors of RepOptimizer, by running the paper's own code.

    git clone https://github.com/DingXiaoH/RepOptimizers
    cd RepOptimizers && git checkout 2e45ff5
    PYTHONPATH=. python .../tests/data/record_repopt.py OUT.npz

It needs PyTorch and NumPy, and nothing of mmdbb. ``repopt.npz`` beside it has,
for a small ``RepOptVGG`` in float64, arrays ``KIND/NAME`` under the code's own
names: the scales of a search (``search``, random here), the plain network
before and after ``RepOptVGGHandler.reinitialize`` (``before``, ``start``;
the 1x1 kernels that it draws are the numbers of ``drawn`` below), five batches
``x`` and ``y``, and after five steps of ``RepOptimizerSGD`` on them the
network (``end``) and the ``losses``.
"""

import sys

import numpy as np
import torch
from optimizer import set_weight_decay
from repoptimizer.repoptimizer_sgd import RepOptimizerSGD
from repoptimizer.repoptvgg_impl import RepOptVGGHandler, extract_scales
from repoptimizer.repoptvgg_model import RepOptVGG
from torch import nn

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.manual_seed(0)
ARCH = dict(
    num_blocks=[2, 1, 1, 1],
    num_classes=3,
    strides=(2, 1, 2, 1, 1),
    width_multiplier=[1 / 16, 3 / 64, 1 / 64, 1 / 128],
)


@torch.no_grad()
def drawn(tensor, a=0.0):
    """In place of random numbers, which depend on what was drawn before."""
    numbers = torch.linspace(-1, 2, tensor.numel()).sin()
    return tensor.copy_(numbers.reshape(tensor.shape))


def under(kind, state):
    return {f'{kind}/{name}': value.clone() for name, value in state.items()}


def main():
    search = RepOptVGG(mode='hs', **ARCH)
    for name, parameter in search.named_parameters():
        if '.scale_' in name:
            parameter.data.uniform_(0.3, 1.7)
    scales = {n: v for n, v in search.state_dict().items() if '.scale_' in n}
    model = RepOptVGG(mode='target', **ARCH)
    handler = RepOptVGGHandler(model, extract_scales(search), cpu_mode=True)
    data = {**under('search', scales), **under('before', model.state_dict())}
    nn.init.kaiming_uniform_, random = drawn, nn.init.kaiming_uniform_
    handler.reinitialize()
    nn.init.kaiming_uniform_ = random
    data.update(under('start', model.state_dict()))
    optimizer = RepOptimizerSGD(
        handler.generate_grad_mults(),
        set_weight_decay(model),
        lr=0.05,
        momentum=0.9,
        weight_decay=0.01,
        nesterov=True,
    )
    data['x'] = torch.randn(5, 4, 3, 9, 8)
    data['y'] = torch.randint(0, 3, (5, 4))
    losses = []
    for x, y in zip(data['x'], data['y']):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    data.update(under('end', model.state_dict()), losses=torch.stack(losses))
    arrays = {name: value.detach().numpy() for name, value in data.items()}
    np.savez_compressed(sys.argv[1], **arrays)


if __name__ == '__main__':
    main()
