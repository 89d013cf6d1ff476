# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Layers that compute in float, but round as the INT8 network will.

A layer stays the same object, with its name and its parameters. It gets
quantizers as submodules, and its class becomes a subclass whose forward pass
runs through them. A block quantizes its *equivalent* kernel, not the kernels
of its branches, because the INT8 network has the merged kernel only.
A layer with a forward of its own runs that forward, and the convolution in it
computes with rounded numbers. Layers whose convolution is not that of their
``weight`` stay in float, see :func:`mmdbb.own_forward.is_plain`.
"""

from __future__ import annotations

import functools
from typing import Dict, Optional, Tuple, Type

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.build import kind_of_block
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.dimensions import CONV2D
from mmdbb.geometry import convolve
from mmdbb.mm.quantization.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
)
from mmdbb.own_forward import Product, WatchedProducts, is_plain

#: Names of a layer's quantizers. An entry of the weight's quantizer in a state
#: dict marks a checkpoint of quantization-aware training.
INPUT, WEIGHT, OUTPUT = (
    'input_quantizer',
    'weight_quantizer',
    'output_quantizer',
)


class _Quantized:
    """Mixin for a layer with quantizers; it precedes the layer's own class."""

    def forward(self, x: Tensor) -> Tensor:
        """Run on rounded input and weight; if turned off, run as before."""
        if not is_quantizing(self):
            return super().forward(x)
        return self._quantized(x)

    def _quantized(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class was made at run time, so a pickle cannot name it.
        _, (cls, *_), *rest = super().__reduce_ex__(protocol)
        return _remade, (_own_class(cls),), *rest


class QuantizedBlock(_Quantized):
    """Mixin for a block; it quantizes the equivalent kernel.

    The norms in the branches use their running statistics in training too.
    With batch statistics, every batch would have another kernel.
    """

    def _quantized(self, x: Tensor) -> Tensor:
        x = self._modules[INPUT](x)
        kernel, bias = self.get_equivalent_kernel_bias()
        kernel = _folded(self, kernel)
        return convolve(x, kernel.to(x.dtype), bias.to(x.dtype), self.spec)


class QuantizedPlain(_Quantized):
    """Mixin for ``nn.Conv2d``, ``nn.Linear`` and their subclasses.

    The layer's own forward runs; the convolution or the matrix product in it
    gets a rounded input and the rounded weight.
    """

    def _quantized(self, x: Tensor) -> Tensor:
        with WatchedProducts(self._rounded):
            return super(_Quantized, self).forward(x)

    def _rounded(self, product: Product) -> Tuple[Tensor, Tensor]:
        if product.weight is not self.weight:
            return product.x, product.weight
        x = self._modules[INPUT](product.x)
        return x, _folded(self, product.weight)


def _folded(layer: nn.Module, kernel: Tensor) -> Tensor:
    """Quantize a kernel as if the norm behind it were folded in already.

    The INT8 file has the folded kernel. If each channel has its own scale,
    folding changes that scale and leaves the integers, so nothing is to do.
    """
    quantize, (norm,) = layer._modules[WEIGHT], layer.folded_norm
    if quantize.per_channel or norm is None:
        return quantize(kernel)
    scale = norm_scale_shift(norm).scale.reshape(-1, 1, 1, 1)
    # The norm erases such a channel, so its rounding does not matter; a
    # scale of one avoids dividing by zero.
    scale = torch.where(scale.abs() < 1e-12, torch.ones_like(scale), scale)
    return quantize(kernel * scale) / scale


_KINDS = (ReparamConv2d, nn.Conv2d, nn.Linear)


@functools.cache
def _quantized_class(cls: Type[nn.Module]) -> Type[nn.Module]:
    """The subclass of a layer's class that has quantizers."""
    is_block = issubclass(cls, ReparamConv2d)
    mixin = QuantizedBlock if is_block else QuantizedPlain
    return type(f'Quantized{cls.__name__}', (mixin, cls), {})


def _own_class(cls: Type[nn.Module]) -> Type[nn.Module]:
    """Undo :func:`_quantized_class`."""
    return cls.__bases__[1]


def _remade(cls: Type[nn.Module]) -> nn.Module:
    """Make an empty layer with quantizers, for a pickle or a copy to fill."""
    return object.__new__(_quantized_class(cls))


def quantizable_layers(model: nn.Module) -> Dict[str, nn.Module]:
    """Find the layers that can be quantized.

    Args:
        model: Any model.

    Returns:
        dict: Blocks, convolutions and linear layers by name. Layers inside
        blocks are left out: the block as a whole becomes one convolution.
    """
    return {
        name: layer
        for name, layer in _layers(model).items()
        if _has_place(layer)
    }


def own_layers(model: nn.Module) -> Dict[str, nn.Module]:
    """Find the convolutions and linear layers that cannot be quantized.

    Their forward is their own: the kernel that they convolve with is not
    their weight, or they change the result, see
    :func:`mmdbb.own_forward.is_plain`.

    Args:
        model: Any model.

    Returns:
        dict: The layers by name. They stay in float.
    """
    return {
        name: layer
        for name, layer in _layers(model).items()
        if not _has_place(layer)
    }


def _has_place(layer: nn.Module) -> bool:
    return isinstance(layer, _Quantized) or is_plain(layer)


def _layers(model: nn.Module) -> Dict[str, nn.Module]:
    layers, inside = {}, set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, ReparamConv2d):
            inside.update(module.modules())
        if isinstance(module, _KINDS) and not _is_of_other_kind(module):
            layers[name] = module
    return layers


def _is_of_other_kind(module: nn.Module) -> bool:
    """Whether a block stands for another layer than an ``nn.Conv2d``.

    It stays in float, as torch's own layers of those kinds do.
    """
    is_block = isinstance(module, ReparamConv2d)
    return is_block and kind_of_block(module) != CONV2D


def add_quantizers_(
    layer: nn.Module,
    averaging_constant: float = 0.01,
    per_channel: bool = True,
    reduce_range: bool = False,
    norm: Optional[nn.Module] = None,
) -> None:
    """Give a layer quantizers for input and weight, turned off.

    A layer that has them already stays as it is.

    Args:
        layer: A layer that :func:`quantizable_layers` returned.
        averaging_constant: Weight of each new batch in the moving average of
            the input's range.
        per_channel: Whether each output channel of the weight has a scale of
            its own.
        reduce_range: Whether the weight uses seven bits.
        norm: The batch norm behind the layer that the export folds into it;
            None if there is none.
    """
    if isinstance(layer, _Quantized):
        return
    device = next(layer.parameters()).device
    layer.add_module(INPUT, ActivationQuantizer(averaging_constant).to(device))
    weight_quantizer = WeightQuantizer(per_channel, reduce_range)
    # Averaged copies (EMAHook) and checkpoints need buffers of final shapes.
    weight_quantizer(torch.zeros(_outputs(layer), 1))
    layer.add_module(WEIGHT, weight_quantizer.to(device))
    layer.folded_norm = (norm,)  # a tuple is no submodule
    layer.__class__ = _quantized_class(type(layer))
    set_quantizing_(layer, False)


def _outputs(layer: nn.Module) -> int:
    """Number of a layer's output channels."""
    is_linear = isinstance(layer, nn.Linear)
    return layer.out_features if is_linear else layer.out_channels


def add_output_quantizer_(
    module: nn.Module, relu: bool, averaging_constant: float = 0.01
) -> None:
    """Give a module a quantizer for its output, turned off.

    Args:
        module: A layer, or the norm behind it.
        relu: Whether the output is read through a ReLU only.
        averaging_constant: Weight of each new batch in the moving average of
            the output's range.
    """
    parameter = next(module.parameters(), None)
    device = None if parameter is None else parameter.device
    quantizer = ActivationQuantizer(averaging_constant, relu).to(device)
    module.add_module(OUTPUT, quantizer)
    set_quantizing_(quantizer, False)
    module.register_forward_hook(_quantize_output)


def _quantize_output(module: nn.Module, args, output: Tensor) -> Tensor:
    quantizer = module._modules.get(OUTPUT)
    return output if quantizer is None else quantizer(output)


def is_quantizing(layer: nn.Module) -> bool:
    """Whether a layer has quantizers, and they are turned on."""
    quantizer = layer._modules.get(WEIGHT)
    return quantizer is not None and bool(quantizer.fake_quant_enabled[0])


def quantizers(model: nn.Module) -> Tuple[FakeQuantize, ...]:
    """All quantizers of a model."""
    return tuple(m for m in model.modules() if isinstance(m, FakeQuantize))


def set_quantizing_(model: nn.Module, on: bool = True) -> None:
    """Turn all quantizers on or off.

    Args:
        model: A network that
            :func:`mmdbb.mm.quantization.qat.prepare_qat_` has prepared.
        on: True to round, and in training mode to update the ranges of
            activations; False to compute in floating point.
    """
    for quantizer in quantizers(model):
        quantizer.enable_fake_quant(on)
        quantizer.enable_observer(on)


def freeze_ranges_(model: nn.Module) -> None:
    """Stop updating the ranges of activations; weights' ranges still follow.

    Args:
        model: A network with quantizers.
    """
    for quantizer in quantizers(model):
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.disable_observer()


def remove_quantizers_(model: nn.Module) -> None:
    """Remove all quantizers; the network keeps its weights, in float.

    Args:
        model: A network with quantizers; changed in place.
    """
    for module in model.modules():
        if isinstance(module, _Quantized):
            module.__class__ = _own_class(type(module))
            for name in ('output_holder', 'folded_norm'):
                module.__dict__.pop(name, None)
        for name in (INPUT, WEIGHT, OUTPUT):
            module._modules.pop(name, None)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _quantize_output:
                del module._forward_hooks[key]
