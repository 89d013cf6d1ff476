# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Find out who reads each layer's output, and so where quantizers must go.

A layer computes in integers only if both its input and its output are
quantized. If only other layers read the output, perhaps through a norm, a ReLU
or a max pooling, their input quantizers do it. If anything else reads it, such
as the sum of a residual connection, the output needs a quantizer of its own.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from mmdbb.folding import is_foldable
from mmdbb.mm.data_flow import channels_of
from mmdbb.mm.export.modules import export_module, is_detector
from mmdbb.mm.quantization.fake import quantizable_layers
from mmdbb.modules import in_eval_mode
from mmdbb.tracing import sole_readers

#: Operations that need no quantizer of their own: their outputs are a subset
#: of their inputs' quantized values, or (norms) fold into the layer before.
_RELUS = ('relu', 'relu_', 'relu6', 'hardtanh', 'hardtanh_')
_PASS = (
    *_RELUS,
    'batch_norm',
    'max_pool2d',
    '_max_pool2d',
    'boolean_dispatch',
    'dropout',
    'flatten',
    'contiguous',
)


class Written(NamedTuple):
    """What follows a layer, and whether its output needs a quantizer.

    Attributes:
        norm: Name of the batch norm behind the layer, None if there is none.
        quantized: Whether the output, after that norm, needs a quantizer.
        relu: Whether all readers read the output through a ReLU.
    """

    norm: Optional[str]
    quantized: bool
    relu: bool


@torch.no_grad()
def layers_to_quantize(
    model: nn.Module, image_size: Tuple[int, int] = (64, 64)
) -> Dict[str, Written]:
    """Run a network on an image of zeros, and note who reads each output.

    Args:
        model: A classifier, segmentor, detector, or any module that maps
            images to tensors. It runs in eval mode, and stays unchanged.
        image_size: Height and width of the image in pixels.

    Returns:
        dict: Names of the layers that an export runs through (no auxiliary
        heads) -> what follows each.
    """
    layers = quantizable_layers(model)
    if not layers:
        return {}
    names = {module: name for name, module in model.named_modules()}
    network = export_module(model, head=is_detector(model))
    parameter = next(model.parameters())
    images = parameter.new_zeros(1, channels_of(model), *image_size)
    # Only plain batch norms fold into the layer.
    norms = {
        layer: norm
        for layer, norm in sole_readers(network, images).items()
        if is_foldable(norm)
    }
    watch = _Watch(layers, norms)
    try:
        with in_eval_mode(model), watch:
            network(images)
    finally:
        watch.remove()
    found = {}
    for name, layer in layers.items():
        if layer not in watch.reached:
            continue
        reads = watch.reads.get(layer, [])
        norm = norms.get(layer)
        found[name] = Written(
            None if norm is None else names[norm],
            any(other for other, _ in reads),
            all(relu for _, relu in reads),
        )
    return found


class _Origin(NamedTuple):
    tensor: Tensor  # kept alive, so that no other tensor gets its id
    layer: nn.Module
    relu: bool


class _Watch(TorchFunctionMode):
    """Notes who reads the output of each layer.

    Args:
        layers: The layers by name.
        norms: Those with a norm that folds into them -> that norm.

    Attributes:
        reads: Layer -> its readers. Of each reader: whether it is anything
            but a layer, and whether it reads through a ReLU.
        reached: The layers that ran.
    """

    def __init__(
        self,
        layers: Dict[str, nn.Module],
        norms: Dict[nn.Module, nn.Module],
    ) -> None:
        super().__init__()
        self._norms = norms
        self.reads: Dict[nn.Module, List[Tuple[bool, bool]]] = {}
        self.reached = set()
        self._origins: Dict[int, _Origin] = {}
        self._inside = 0
        self._hooks = []
        for layer in layers.values():
            self._hooks += [
                layer.register_forward_pre_hook(self._enter),
                layer.register_forward_hook(self._leave),
            ]

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, layer: nn.Module, args: Any) -> None:
        self.reached.add(layer)
        if not self._inside:
            self._read(args, other=False)
        self._inside += 1

    def _leave(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self._inside -= 1
        if not self._inside:
            self._origins[id(output)] = _Origin(output, layer, False)

    def _read(self, values: Any, other: bool) -> Optional[_Origin]:
        origin = None
        for value in tree_flatten(values)[0]:
            if isinstance(value, Tensor) and id(value) in self._origins:
                origin = self._origins[id(value)]
                read = (other, origin.relu)
                self.reads.setdefault(origin.layer, []).append(read)
        return origin

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        inputs = args[:1] if name in _PASS else (args, kwargs)
        origins = [
            self._origins[id(value)]
            for value in tree_flatten(inputs)[0]
            if isinstance(value, Tensor) and id(value) in self._origins
        ]
        output = func(*args, **kwargs)
        if self._inside or not origins:
            return output
        if not isinstance(output, (Tensor, tuple, list)):
            return output  # a shape, a device
        passes = name in _PASS and (
            name != 'batch_norm' or origins[0].layer in self._norms
        )
        if passes and isinstance(output, Tensor):
            relu = origins[0].relu or name in _RELUS
            self._origins[id(output)] = _Origin(output, origins[0].layer, relu)
        elif any(isinstance(v, Tensor) for v in tree_flatten(output)[0]):
            self._read((args, kwargs), other=True)
        return output
