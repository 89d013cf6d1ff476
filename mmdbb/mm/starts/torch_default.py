# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""``init_cfg=dict(type='TorchDefault')``: the start of the papers' networks.

The papers' code has no initialisation of its own: outside blocks each layer
keeps torch's defaults. The OpenMMLab packages draw from wider or narrower
distributions: the standard deviation is 0.52 times torch's in a ResNet's stem,
1.73 times in a shortcut, 2.45 times in a pointwise layer of MobileNet. That
matters in front of a norm: the larger the weights, the less a step of the same
learning rate changes the output.
"""

from __future__ import annotations

import hashlib
from typing import Iterator, Tuple

import torch
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.mm.host_internals import shared_notes
from mmdbb.mm.starts.last import AppliedLast


@WEIGHT_INITIALIZERS.register_module(name='TorchDefault')
class TorchDefaultInit(AppliedLast):
    """Give every layer outside blocks torch's default start values.

    Blocks keep their own start, which follows the papers' code. The values of
    a layer depend only on torch's seed and on the layer's name, type and
    shapes, not on the random numbers drawn before. So two networks that
    differ in their blocks get the same values in all layers that they share.
    Two networks built one after the other get the same values, too; call
    ``torch.manual_seed`` with another seed in between if they should differ.

    The rule runs after the children's own initialisation and before the
    backbone's last step, so ``zero_init_residual=True`` still has its effect.

    Raises:
        UserError: If another rule of the same ``init_cfg`` would overwrite
            the start values.

    Examples:
        >>> from mmengine.model import BaseModule
        >>> class Net(BaseModule):
        ...     def __init__(self):
        ...         super().__init__(dict(type='TorchDefault'))
        ...         self.conv = nn.Conv2d(4, 8, 3)
        >>> net = Net()
        >>> _ = nn.init.zeros_(net.conv.weight)
        >>> net.init_weights()
        >>> 0 < net.conv.weight.abs().max().item() <= (4 * 3 * 3) ** -0.5
        True
    """

    type_name = 'TorchDefault'

    def fill(self, module: nn.Module) -> None:
        """Draw the weights of all layers outside blocks again.

        Args:
            module: The module whose ``init_cfg`` has this rule.
        """
        notes = shared_notes(module)
        taken = notes.setdefault('seeds of TorchDefault', set())
        for name, layer in _layers(module):
            seed = _seed_of(name, layer)
            while seed in taken:  # another part has a layer just like it
                seed = (seed + 1) % 2**63
            taken.add(seed)
            _reset(layer, seed)


def _layers(
    module: nn.Module, prefix: str = ''
) -> Iterator[Tuple[str, nn.Module]]:
    """Names and layers outside blocks that torch gives a default start."""
    if isinstance(module, ReparamConv2d):
        return
    if hasattr(module, 'reset_parameters'):
        yield prefix, module
    for name, child in module.named_children():
        yield from _layers(child, f'{prefix}.{name}' if prefix else name)


def _seed_of(name: str, layer: nn.Module) -> int:
    shapes = [tuple(p.shape) for p in layer.parameters(recurse=False)]
    text = f'{torch.initial_seed()} {name} {type(layer).__name__} {shapes}'
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], 'big') % 2**63


@torch.no_grad()
def _reset(layer: nn.Module, seed: int) -> None:
    """Let a layer reset its parameters, with a random seed of its own.

    The numbers are drawn on the CPU, so that the start is the same on a GPU.

    Args:
        layer: The layer, on any device; changed in place.
        seed: The random seed. The state of torch's generator is restored.
    """
    own = (layer._parameters, layer._buffers)
    before = [dict(tensors) for tensors in own]
    state = torch.get_rng_state()
    try:
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = tensor.to('cpu', copy=True)
        torch.default_generator.manual_seed(seed)
        layer.reset_parameters()
        for tensors, originals in zip(own, before):
            for name, tensor in originals.items():
                if tensor is not None:
                    tensor.copy_(tensors[name])
    finally:
        for tensors, originals in zip(own, before):
            tensors.update(originals)
        torch.set_rng_state(state)
