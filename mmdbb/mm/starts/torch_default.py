# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""``init_cfg=dict(type='TorchDefault')``: the start of the papers' networks.

Their code initialises nothing: outside blocks each layer keeps what torch
gives it. The hosts' rules are wider or narrower (a ResNet's stem 0.52, a
shortcut 1.73, a pointwise layer of MobileNet 2.45 times torch's standard
deviation), and behind a norm the width of a start sets how fast it changes.
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
    """Start every layer outside blocks as torch does by itself.

    Blocks keep their own start, which is that of the papers' code. What a
    layer gets follows from torch's seed, its name, kind and shape, not from
    what was drawn before. So networks that differ in their blocks start
    equal in all that they share; and so do two networks that are built of one
    seed, which ``torch.manual_seed`` between them makes differ.

    It is applied after the children's own initialisation, and before the
    host's last step: ``zero_init_residual=True`` still holds.

    Raises:
        UserError: If another rule of the same ``init_cfg`` would overwrite
            the start.

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
        """Draw the weights of all layers outside blocks again."""
        notes = shared_notes(module)
        taken = notes.setdefault('seeds of TorchDefault', set())
        for name, layer in _layers(module):
            seed = _seed_of(name, layer)
            while seed in taken:  # the same layer in another part
                seed = (seed + 1) % 2**63
            taken.add(seed)
            _reset(layer, seed)


def _layers(
    module: nn.Module, prefix: str = ''
) -> Iterator[Tuple[str, nn.Module]]:
    """The layers outside blocks that torch gives a start."""
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
    """Reset a layer by numbers that no other layer has a share in.

    They are drawn on the CPU, so that a GPU starts from the same.
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
