# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Measure what a network loses without a branch.

The merged network is run with the branch's kernel and bias taken out of the
merged convolution. Nothing is trained afterwards, and no norm's statistics are
measured again: it is what the branch does in this network, not what a network
trained without it would be worth.
"""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, nn

from mmdbb.report.figures import Lost
from mmdbb.running import is_of_head, run_network
from mmdbb.transforms import KernelBias, swap_channels

#: Layer -> branch -> its part of the merged kernel and bias.
Parts = Dict[str, Dict[str, KernelBias]]


class Dropping(NamedTuple):
    """What the network loses without branches.

    Attributes:
        single: Layer -> branch -> what is lost without this one.
        kinds: Name of a branch -> change of the network's output without all
            branches of this name.
    """

    single: Dict[str, Dict[str, Lost]]
    kinds: Dict[str, float]


@contextlib.contextmanager
def without(
    merged: nn.Module, parts: Parts, left_out: Mapping[str, str]
) -> Iterator[nn.Module]:
    """Within the context, branches are taken out of the merged network.

    Args:
        merged: The merged network.
        parts: The parts of its layers.
        left_out: Layer -> name of the branch to take out.
    """
    kept = []
    with torch.no_grad():
        for layer, branch in left_out.items():
            part = parts[layer][branch]
            conv: Any = merged.get_submodule(layer)
            if getattr(conv, 'transposed', False):
                kernel = swap_channels(part.kernel, conv.groups)
                part = part._replace(kernel=kernel)
            for tensor, value in zip((conv.weight, conv.bias), part):
                if tensor is not None:
                    kept.append((tensor, tensor.clone()))
                    tensor.sub_(value.to(tensor))
    try:
        yield merged
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


@torch.no_grad()
def measure_dropping(
    merged: nn.Module, parts: Parts, images: Tensor
) -> Dropping:
    """Run the merged network without each branch, and without each kind.

    It is run once for each layer and once for each branch of it.

    Args:
        merged: The merged network, in eval mode; unchanged afterwards.
        parts: The parts of its layers.
        images: Normalised images (N, C, H, W).
    """
    before = _outputs(merged, images)
    single: Dict[str, Dict[str, Lost]] = {}
    for layer, branches in parts.items():
        own = _Watch(merged.get_submodule(layer))
        with own:
            run_network(merged, images, once=True)
        expected, single[layer] = own.outputs, {}
        for branch in branches if expected else ():
            with without(merged, parts, {layer: branch}), own:
                found = _outputs(merged, images)
            single[layer][branch] = Lost(
                _change(own.outputs, expected), _largest(found, before)
            )
    kinds = {}
    for kind in kinds_of(parts):
        with without(merged, parts, kind_of(parts, kind)):
            kinds[kind] = _largest(_outputs(merged, images), before)
    return Dropping(single, kinds)


def kinds_of(parts: Mapping[str, Mapping[str, object]]) -> List[str]:
    """Names of branches, each once, in the order in which they are met."""
    return list(dict.fromkeys(n for own in parts.values() for n in own))


def kind_of(
    parts: Mapping[str, Mapping[str, object]], kind: str
) -> Dict[str, str]:
    """The layers that have a branch of a name -> the name."""
    return {layer: kind for layer, own in parts.items() if kind in own}


class _Watch:
    """Within the context, collect the outputs of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.outputs: List[Tensor] = []

    def __enter__(self) -> None:
        outputs = self.outputs = []
        self._hook = self._module.register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )

    def __exit__(self, *_) -> None:
        self._hook.remove()


def _outputs(network: nn.Module, images: Tensor) -> Dict[str, Tensor]:
    """The outputs of heads; the features where there is no head."""
    found = run_network(network, images, once=True).tensors
    heads = {n: y for n, y in found.items() if is_of_head(n)}
    return heads or found


def _largest(found: Dict[str, Tensor], before: Dict[str, Tensor]) -> float:
    changes = [
        _change([found[name]], [value])
        for name, value in before.items()
        if name in found
    ]
    return max((c for c in changes if c is not None), default=0.0)


def _change(found: List[Tensor], before: List[Tensor]) -> Optional[float]:
    """Root mean square of the change, relative to that of the values."""
    pairs = [(a, b) for a, b in zip(found, before) if a.shape == b.shape]
    moved = sum((a - b).double().square().sum().item() for a, b in pairs)
    size = sum(b.double().square().sum().item() for _, b in pairs)
    return (moved / size) ** 0.5 if size else None
