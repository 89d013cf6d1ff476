# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A tour of mmdbb in plain PyTorch: train branches, merge them, compare.

    python docs/tour.py

The page beside this file, tour.md, shows the output.
"""

import torch
from torch import nn
from torch.nn import functional as F

from mmdbb import DBB, reparameterize


def stripes(count):
    """Noisy images of horizontal (0) or vertical (1) stripes."""
    labels = torch.arange(count) % 2
    waves = torch.sin(torch.arange(16) + 6.3 * torch.rand(count, 1, 1))
    vertical = waves.expand(-1, 16, -1)
    images = torch.where(labels[:, None, None] == 1, vertical, vertical.mT)
    return images[:, None] + torch.randn(count, 1, 16, 16), labels


def difference(found, expected):
    """The largest difference, relative to the largest magnitude."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


torch.manual_seed(0)

# 1. A network. A DBB takes the arguments of nn.Conv2d and stands in the place
#    of a convolution and its batch norm.
model = nn.Sequential(
    DBB(1, 8, 3, padding=1),
    nn.ReLU(),
    DBB(8, 16, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(16, 2),
)
print(f'1. a network of two blocks, {parameters(model)} parameters')

# 2. The branches of a block. They all read the block's input, and their
#    outputs have one shape. In training the block gives their sum.
block = model[2]
print('2. branches of the second block')
features = torch.randn(4, 8, 16, 16)
for name, branch in block.branches.items():
    print(f'   {name:8} gives {tuple(branch(features).shape)}')

# 3. Training knows nothing of blocks: any loss, any optimizer.
print('3. training')
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for step in range(21):
    images, labels = stripes(64)
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        print(f'   step {step:2}: loss {loss.item():.3f}')

# 4. In eval mode a batch norm is a scale and a shift, so every branch is a
#    convolution with a kernel of the block's size. How large are they?
model.eval()
with torch.no_grad():
    kernels = {
        name: branch.equivalent_kernel_bias().kernel
        for name, branch in block.branches.items()
    }
total = sum(kernel.norm() for kernel in kernels.values())
print('4. kernels of the branches')
for name, kernel in kernels.items():
    share = (kernel.norm() / total).item()
    print(f'   {name:8} {tuple(kernel.shape)}, {share:.0%} of the norms')

# 5. Convolutions of one geometry add up, so the block is one convolution. Its
#    kernel is the sum of the kernels above.
merged = reparameterize(model)  # a copy; `model` keeps its branches
conv = merged[2]
print('5. merged')
print(f'   {conv}')
print(f'   parameters: {parameters(merged)}')
assert type(conv) is nn.Conv2d

kernel_difference = difference(conv.weight, sum(kernels.values()))
print(f'   kernel and sum of kernels differ by {kernel_difference:.0e}')
assert kernel_difference < 1e-5

# 6. The merged network computes what the trained one does. Compare with the
#    branches, because in eval mode a block already runs its merged kernel.
images, labels = stripes(256)
with torch.no_grad():
    x = model[1](model[0].forward_branches(images))
    x = model[3](model[2].forward_branches(x))
    expected = model[4:](x)
    found = merged(images)
output_difference = difference(found, expected)
print('6. compared on new images')
print(f'   outputs differ by {output_difference:.0e}')
assert output_difference < 1e-5
right = (found.argmax(1) == labels).float().mean().item()
print(f'   {right:.0%} of {len(images)} images are right')
