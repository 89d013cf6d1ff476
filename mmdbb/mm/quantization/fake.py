# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Layers that compute in float, but round as the INT8 network will.

A layer stays the same object, with its name and its parameters. It gets
quantizers as submodules, and its class becomes a subclass whose forward pass
runs through them. A block quantizes its *equivalent* kernel, not the kernels
of its branches, because the INT8 network has the merged kernel only.
Quantizers and observers are torch's own
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

#: Names of a layer's quantizers. An entry of the weight's quantizer in a state
#: dict marks a checkpoint of quantization-aware training.
INPUT, WEIGHT, OUTPUT = (
    'input_quantizer',
    'weight_quantizer',
    'output_quantizer',
)

#: Largest integer of a weight: with eight bits, and with seven.
LIMIT, REDUCED_LIMIT = 127, 63


class WeightQuantizer(FakeQuantize):
    """Round a kernel to int8, -127..127, with the range that it has now.

    The integers are symmetric about zero. A norm folded into the kernel later
    scales channels and may flip their signs; so it changes the signs of
    integers at most.

    Args:
        per_channel: Whether each output channel has a scale of its own.
        reduce_range: Whether to use seven bits, -63..63, because the
            eight-bit products of some processors saturate (x86 without VNNI).

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
        # A buffer, so that the checkpoint says which range was trained.
        self.register_buffer('limit', torch.tensor(limit))

    def forward(self, kernel: Tensor) -> Tensor:
        """Measure the kernel's range, and round the kernel with it."""
        self.activation_post_process.reset_min_max_vals()
        return super().forward(kernel)


class ActivationQuantizer(FakeQuantize):
    """Round activations to uint8, with one scale and one zero point.

    Both come from a moving average of the batches' ranges.

    Args:
        averaging_constant: Weight of each new batch in the moving average.
        relu: Whether a ReLU follows. The range then starts at zero, so
            rounding cuts negative values off, as the ReLU does.

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
        """Update the range while observing, and round if turned on."""
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
        """Whether ranges are updated: in training, until they are frozen."""
        return self.training and bool(self.observer_enabled[0])


class _Quantized:
    """Mixin for a layer with quantizers; it precedes the layer's own class."""

    def forward(self, x: Tensor) -> Tensor:
        """Run on rounded input and weight; if turned off, run as before."""
        weight_quantizer = self._modules.get(WEIGHT)
        if weight_quantizer is None or not is_quantizing(self):
            return super().forward(x)
        return self._quantized(self._modules[INPUT](x), weight_quantizer)

    def _quantized(self, x: Tensor, quantize: nn.Module) -> Tensor:
        raise NotImplementedError


class QuantizedBlock(_Quantized):
    """Mixin for a block; it quantizes the equivalent kernel.

    The norms in the branches use their running statistics in training too.
    With batch statistics, every batch would have another kernel.
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
    """Quantize a kernel as if the norm behind it were folded in already.

    The INT8 file has the folded kernel. If each channel has its own scale,
    folding changes that scale and leaves the integers, so nothing is to do.
    """
    (norm,) = layer.folded_norm
    if quantize.per_channel or norm is None:
        return quantize(kernel)
    scale = norm_scale_shift(norm).scale.reshape(-1, 1, 1, 1)
    # The norm erases such a channel, so its rounding does not matter; a
    # scale of one avoids dividing by zero.
    scale = torch.where(scale.abs() < 1e-12, torch.ones_like(scale), scale)
    return quantize(kernel * scale) / scale


_KINDS = (
    (ReparamConv2d, QuantizedBlock),
    (nn.Conv2d, QuantizedConv2d),
    (nn.Linear, QuantizedLinear),
)
_CLASSES: Dict[Type[nn.Module], type] = {}


def quantizable_layers(model: nn.Module) -> Dict[str, nn.Module]:
    """Find the layers that can be quantized.

    Args:
        model: Any model.

    Returns:
        dict: Blocks, convolutions and linear layers by name. Layers inside
        blocks are left out: the block as a whole becomes one convolution.
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
    # Subclass the layer's own class, whose forward may differ from the base's.
    cls = type(layer)
    if cls not in _CLASSES:
        mixin = next(m for base, m in _KINDS if issubclass(cls, base))
        _CLASSES[cls] = type(f'Quantized{cls.__name__}', (mixin, cls), {})
    device = next(layer.parameters()).device
    layer.add_module(INPUT, ActivationQuantizer(averaging_constant).to(device))
    weight_quantizer = WeightQuantizer(per_channel, reduce_range)
    layer.add_module(WEIGHT, weight_quantizer.to(device))
    layer.folded_norm = (norm,)  # a tuple is no submodule
    layer.__class__ = _CLASSES[cls]
    set_quantizing_(layer, False)


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
            module.__class__ = type(module).__bases__[1]
            for name in ('output_holder', 'folded_norm'):
                module.__dict__.pop(name, None)
        for name in (INPUT, WEIGHT, OUTPUT):
            module._modules.pop(name, None)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _quantize_output:
                del module._forward_hooks[key]
