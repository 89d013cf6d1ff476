# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Whether a layer computes what its class and its weight say.

``isinstance(layer, nn.Conv2d)`` holds for subclasses too, and these may
override ``forward``: they standardise the weight, scale the output, or pad the
image in a way of their own. Whoever takes the weight of such a layer for its
kernel gets another function. So a layer whose forward is not known is run once
by itself, and the convolutions (or matrix products) that it computes are
watched.
"""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.dimensions import CONVS, FORWARD_CONVS
from mmdbb.files.sources import some
from mmdbb.modules import small_size

_PRODUCTS = ('conv1d', 'conv2d', 'conv3d', 'linear')


class Product(NamedTuple):
    """One convolution or matrix product.

    Attributes:
        x: The input.
        weight: The kernel, (out, in / groups, kH, kW) or (out, in).
        bias: The bias, (out,), or None.
    """

    x: Tensor
    weight: Tensor
    bias: Optional[Tensor]


class WatchedProducts(TorchFunctionMode):
    """Within the context, a function sees and changes each product.

    Args:
        change: Takes a :class:`Product`, and returns the input and the weight
            to compute with instead.
        see: Takes each product's result, if given.
    """

    def __init__(
        self,
        change: Callable[[Product], Tuple[Tensor, Tensor]],
        see: Optional[Callable[[Tensor], object]] = None,
    ) -> None:
        super().__init__()
        self._change, self._see = change, see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, '__name__', '') not in _PRODUCTS:
            return func(*args, **kwargs)
        given = dict(zip(('input', 'weight', 'bias'), args), **kwargs)
        x, weight = self._change(
            Product(given['input'], given['weight'], given.get('bias'))
        )
        for name in ('input', 'weight'):
            kwargs.pop(name, None)
        result = func(x, weight, *args[2:], **kwargs)
        if self._see is not None:
            self._see(result)
        return result


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its convolution (or matrix product) and no more.

    That is: it computes one product, with its own parameters ``weight`` and
    ``bias`` as they stand, and returns the result. It may change its input
    before, as layers do that pad by themselves.

    Args:
        layer: A block, or a convolution of torch (a transposed one is not
            known) or ``nn.Linear``, or an instance of a subclass. It stays
            unchanged.
    """
    if 'forward' in vars(layer):
        return False
    if isinstance(layer, ReparamConv2d):
        return type(layer).forward is ReparamConv2d.forward
    if layer._parameters.get('weight') is None:
        return False  # computed before each pass, such as a masked one
    kind: Any = type(layer)
    convs: Tuple[Any, ...] = FORWARD_CONVS
    if kind.forward is nn.Linear.forward or any(
        kind.forward is conv.forward
        and kind._conv_forward is conv._conv_forward
        for conv in convs
    ):
        return True
    return _returns_its_product(layer)


def own_forwards(layers: Dict[str, nn.Module]) -> str:
    """Say why some layers are left out, and name them.

    Args:
        layers: The layers by name.
    """
    names = [f'{n} ({type(each).__name__})' for n, each in layers.items()]
    return f'because their forward is their own: {some(names, 9)}'


@torch.no_grad()
def _returns_its_product(layer: nn.Module) -> bool:
    found: List[Product] = []
    results: List[Tensor] = []

    def note(product: Product) -> Tuple[Tensor, Tensor]:
        found.append(product)
        return product.x, product.weight

    try:
        # A copy, because a forward may also change the layer.
        layer = copy.deepcopy(layer).eval()
        watch = WatchedProducts(note, results.append)
        with torch.random.fork_rng(devices=[]), watch:
            output = type(layer).forward(layer, _example(layer))
    except Exception:  # a forward of its own may need anything
        return False
    return (
        len(found) == 1
        and found[0].weight is layer._parameters['weight']
        and found[0].bias is layer._parameters.get('bias')
        and results[0] is output
        and output._version == 0  # nothing was added in place
    )


def _example(layer: nn.Module) -> Tensor:
    """A small input for a layer."""
    own: Any = layer
    if not isinstance(layer, CONVS):
        return own.weight.new_ones(2, own.in_features)
    return own.weight.new_ones(2, own.in_channels, *small_size(layer))
