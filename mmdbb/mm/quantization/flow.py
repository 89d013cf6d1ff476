# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What becomes of a layer's output: which layers need it quantized.

What a layer in integers reads must be quantized, and so must what it writes,
or it has to compute in floating point. Where the output goes to other layers
only, perhaps through a norm, a ReLU or a max pooling, they quantize it. Where
something else reads it, a sum for one, it needs a quantizer of its own.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from mmdbb.mm.export.modules import Detector, export_module
from mmdbb.mm.quantization.fake import quantizable_layers
from mmdbb.modules import in_eval_mode
from mmdbb.tracing import sole_readers

#: Functions after which the same integers are there, or fewer.
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
    """What becomes of a layer's output.

    Attributes:
        norm: Name of the batch norm behind the layer, None if there is none.
        quantized: Whether the output, after that norm, needs a quantizer.
        relu: Whether all readers read it through a ReLU.
    """

    norm: Optional[str]
    quantized: bool
    relu: bool


@torch.no_grad()
def layers_to_quantize(
    model: nn.Module, image_size: Tuple[int, int] = (64, 64)
) -> Dict[str, Written]:
    """Run a network on a black image and see what reads what.

    Args:
        model: A classifier, segmentor, detector, or any module that maps
            images to tensors. Unchanged; it is looked at in eval mode.
        image_size: Height and width of the image in pixels.

    Returns:
        dict: Names of the layers that an export runs through (no auxiliary
        heads), and what becomes of the output of each.
    """
    layers = quantizable_layers(model)
    if not layers:
        return {}
    names = {module: name for name, module in model.named_modules()}
    kind = export_module(model)
    if isinstance(kind, Detector):
        kind = export_module(model, head=True)
    channels = getattr(next(iter(layers.values())), 'in_channels', 3)
    images = next(model.parameters()).new_zeros(1, channels, *image_size)
    norms = sole_readers(kind, images)
    watch = _Watch(layers)
    try:
        with in_eval_mode(model), watch:
            kind(images)
    finally:
        watch.remove()
    found = {}
    for name, layer in layers.items():
        if layer not in watch.reached:
            continue
        reads = watch.reads.get(layer, [])
        norm = norms.get(layer)
        if not isinstance(norm, _BatchNorm):
            norm = None  # another kind does not fold into the layer
        found[name] = Written(
            None if norm is None else names[norm],
            any(other for other, _ in reads),
            all(relu for _, relu in reads),
        )
    return found


class _Origin(NamedTuple):
    tensor: Tensor  # kept, so that no other gets its id
    layer: nn.Module
    relu: bool


class _Watch(TorchFunctionMode):
    """Notes who reads what comes from a layer.

    Attributes:
        reads: For each layer its readers: whether it is something else than
            a layer, and whether it reads through a ReLU.
        reached: The layers that ran.
    """

    def __init__(self, layers: Dict[str, nn.Module]) -> None:
        super().__init__()
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
        if name in _PASS and isinstance(output, Tensor):
            relu = origins[0].relu or name in _RELUS
            self._origins[id(output)] = _Origin(output, origins[0].layer, relu)
        elif any(isinstance(v, Tensor) for v in tree_flatten(output)[0]):
            self._read((args, kwargs), other=True)
        return output
