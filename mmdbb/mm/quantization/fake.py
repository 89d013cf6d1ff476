# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Layers that compute as if in eight bits, and stay what they are otherwise.

A layer keeps its module, its name and its parameters; it gets quantizers as
submodules, and a subclass of its own class that runs through them. In a block
the *equivalent* kernel is quantized, not those of its branches: that one is
what the INT8 network has. Quantizers and observers are torch's own
(Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, sec. 3,
https://arxiv.org/abs/1712.05877).
"""

from __future__ import annotations

from typing import Dict, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.geometry import convolve

#: What becomes of a layer's names; an entry that tells such a checkpoint.
INPUT, WEIGHT, OUTPUT = (
    'input_quantizer',
    'weight_quantizer',
    'output_quantizer',
)

#: Largest integers of weights: of eight bits, and of seven.
LIMIT, REDUCED_LIMIT = 127, 63


class WeightQuantizer(FakeQuantize):
    """Int8 in -127..127, with the range of the kernel as it is now.

    Symmetric, so that a norm folded into the kernel later, which scales
    channels and may flip their signs, changes no integer but its sign.

    Args:
        per_channel: Whether each output channel has a scale of its own.
        reduce_range: Whether to use seven bits, -63..63.

    Shape:
        - Input and output: (out, in / groups, kH, kW) or (out, in)
    """

    def __init__(
        self, per_channel: bool = True, reduce_range: bool = False
    ) -> None:
        limit = REDUCED_LIMIT if reduce_range else LIMIT
        arguments = dict(quant_min=-limit, quant_max=limit, dtype=torch.qint8)
        if per_channel:
            super().__init__(
                PerChannelMinMaxObserver,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
                **arguments,
            )
        else:
            super().__init__(
                MinMaxObserver,
                qscheme=torch.per_tensor_symmetric,
                **arguments,
            )
        self.per_channel = per_channel
        # In the checkpoint, so that it says what the weights were trained for.
        self.register_buffer('limit', torch.tensor(limit))

    def forward(self, kernel: Tensor) -> Tensor:
        """The kernel rounded, with the range that it has now."""
        self.activation_post_process.reset_min_max_vals()
        return super().forward(kernel)


class ActivationQuantizer(FakeQuantize):
    """Uint8, one scale and zero point, from a moving average of the ranges.

    Args:
        averaging_constant: Share of each batch in the moving average.
        relu: Whether a ReLU follows: what is below zero then needs no room,
            and quantizing does the ReLU's work.

    Shape:
        - Input and output: any
    """

    def __init__(
        self, averaging_constant: float = 0.01, relu: bool = False
    ) -> None:
        super().__init__(
            MovingAverageMinMaxObserver,
            quant_min=0,
            quant_max=255,
            dtype=torch.quint8,
            qscheme=torch.per_tensor_affine,
            averaging_constant=averaging_constant,
        )
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Note the range, and round where that is turned on."""
        if self.observing:
            seen = x.detach()
            self.activation_post_process(seen.relu() if self.relu else seen)
            scale, zero_point = self.calculate_qparams()
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        if not self.fake_quant_enabled[0]:
            return x
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, self.zero_point, self.quant_min, self.quant_max
        )

    @property
    def observing(self) -> bool:
        """Whether ranges are learned: in training, until they are frozen."""
        return self.training and bool(self.observer_enabled[0])


class _Quantized:
    """Mixin for a layer with quantizers; the layer's own class follows."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own, rounded where that is turned on."""
        weight_quantizer = self._modules.get(WEIGHT)
        if weight_quantizer is None or not is_quantizing(self):
            return super().forward(x)
        return self._quantized(self._modules[INPUT](x), weight_quantizer)

    def _quantized(self, x: Tensor, quantize: nn.Module) -> Tensor:
        raise NotImplementedError


class QuantizedBlock(_Quantized):
    """Mixin for a block: its equivalent kernel is quantized.

    Running statistics are used in training, too: batch statistics would make
    another kernel of every batch.
    """

    def _quantized(self, x: Tensor, quantize: nn.Module) -> Tensor:
        kernel, bias = self.get_equivalent_kernel_bias()
        kernel = _folded(self, kernel, quantize)
        return convolve(x, kernel.to(x.dtype), bias.to(x.dtype), self.spec)


class QuantizedConv2d(_Quantized):
    """Mixin for ``nn.Conv2d``."""

    def _quantized(self, x: Tensor, quantize: nn.Module) -> Tensor:
        kernel = _folded(self, self.weight, quantize)
        return self._conv_forward(x, kernel, self.bias)


class QuantizedLinear(_Quantized):
    """Mixin for ``nn.Linear``."""

    def _quantized(self, x: Tensor, quantize: nn.Module) -> Tensor:
        return F.linear(x, quantize(self.weight), self.bias)


def _folded(
    layer: nn.Module, kernel: Tensor, quantize: WeightQuantizer
) -> Tensor:
    """Quantize a kernel as it will be with the norm behind it folded in.

    With a scale a channel that is the same as without the norm.
    """
    (norm,) = layer.folded_norm
    if quantize.per_channel or norm is None:
        return quantize(kernel)
    scale = norm_scale_shift(norm).scale.reshape(-1, 1, 1, 1)
    # A channel that the norm makes vanish may be anything.
    scale = torch.where(scale.abs() < 1e-12, torch.ones_like(scale), scale)
    return quantize(kernel * scale) / scale


_KINDS = (
    (ReparamConv2d, QuantizedBlock),
    (nn.Conv2d, QuantizedConv2d),
    (nn.Linear, QuantizedLinear),
)
_CLASSES: Dict[Type[nn.Module], type] = {}


def quantizable_layers(model: nn.Module) -> Dict[str, nn.Module]:
    """Blocks, convolutions and linear layers by name; not those in blocks.

    Args:
        model: Any model.
    """
    layers, inside = {}, set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, ReparamConv2d):
            inside.update(module.modules())
        if isinstance(module, tuple(base for base, _ in _KINDS)):
            layers[name] = module
    return layers


def add_quantizers_(
    layer: nn.Module,
    averaging_constant: float = 0.01,
    per_channel: bool = True,
    reduce_range: bool = False,
    norm: Optional[nn.Module] = None,
) -> None:
    """Give a layer quantizers for input and weight, turned off.

    Args:
        layer: From :func:`quantizable_layers`.
        averaging_constant: See :class:`ActivationQuantizer`.
        per_channel: See :class:`WeightQuantizer`, as the next one.
        reduce_range: As there.
        norm: The batch norm behind the layer, which will be folded into it.
    """
    if isinstance(layer, _Quantized):
        return
    # Of the class itself: a subclass may add to what it inherits.
    cls = type(layer)
    if cls not in _CLASSES:
        mixin = next(m for base, m in _KINDS if issubclass(cls, base))
        _CLASSES[cls] = type(f'Quantized{cls.__name__}', (mixin, cls), {})
    device = next(layer.parameters()).device
    layer.add_module(INPUT, ActivationQuantizer(averaging_constant).to(device))
    weight_quantizer = WeightQuantizer(per_channel, reduce_range)
    layer.add_module(WEIGHT, weight_quantizer.to(device))
    layer.folded_norm = (norm,)  # in a tuple it is no submodule
    layer.__class__ = _CLASSES[cls]
    set_quantizing_(layer, False)


def add_output_quantizer_(
    module: nn.Module, relu: bool, averaging_constant: float = 0.01
) -> None:
    """Quantize what a module returns.

    Args:
        module: A layer, or the norm behind it.
        relu: Whether a ReLU is all that reads it.
        averaging_constant: See :class:`ActivationQuantizer`.
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
    """Whether a layer's quantizers are turned on."""
    quantizer = layer._modules.get(WEIGHT)
    return quantizer is not None and bool(quantizer.fake_quant_enabled[0])


def quantizers(model: nn.Module) -> Tuple[FakeQuantize, ...]:
    """All quantizers of a model."""
    return tuple(m for m in model.modules() if isinstance(m, FakeQuantize))


def set_quantizing_(model: nn.Module, on: bool = True) -> None:
    """Turn all quantizers on or off.

    Args:
        model: After :func:`mmdbb.mm.quantization.qat.prepare_qat_`.
        on: Whether to quantize, and in training to learn ranges.
    """
    for quantizer in quantizers(model):
        quantizer.enable_fake_quant(on)
        quantizer.enable_observer(on)


def freeze_ranges_(model: nn.Module) -> None:
    """Keep the ranges of activations as they are; weights' follow them."""
    for quantizer in quantizers(model):
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.disable_observer()


def remove_quantizers_(model: nn.Module) -> None:
    """Make a network in floating point of it again, with its weights."""
    for module in model.modules():
        if isinstance(module, _Quantized):
            module.__class__ = type(module).__bases__[1]
            for name in ('output_holder', 'folded_norm'):
                module.__dict__.pop(name, None)
        for name in (INPUT, WEIGHT, OUTPUT):
            module._modules.pop(name, None)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _quantize_output:
                del module._forward_hooks[key]
