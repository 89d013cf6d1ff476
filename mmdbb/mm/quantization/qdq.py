# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write the INT8 file of a network that was trained for INT8.

The network is exported in float. Then each node is put between
``QuantizeLinear`` and ``DequantizeLinear`` nodes, exactly where the quantizers
stood in training, and with their scales. The file has the same form as a file
by ``onnxruntime.quantization``: int8 weights with a scale a channel (or one
scale), int32 biases, uint8 activations.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional

import numpy as np
import torch
from torch import nn

from mmdbb.errors import UserError
from mmdbb.files.sources import some
from mmdbb.mm.quantization.fake import (
    INPUT,
    OUTPUT,
    WEIGHT,
    quantizable_layers,
)
from mmdbb.mm.quantization.onnx_layers import PREFIX, shield_float_
from mmdbb.mm.quantization.onnx_static import Layers, check_float, layers_of
from mmdbb.mm.quantization.quantizers import WeightQuantizer


class Scale(NamedTuple):
    """How a tensor of activations is quantized.

    Attributes:
        scale: Difference between the values of two neighbouring integers.
        zero_point: Integer that stands for the value zero, 0 to 255.
    """

    scale: float
    zero_point: int


def write_qdq(path: str, out: str, model: nn.Module) -> Layers:
    """Quantize an exported file with the ranges that training learned.

    Args:
        path: Path of the network's float file, blocks merged and norms
            folded.
        out: Path of the file to write.
        model: The network with its quantizers.

    Returns:
        Layers: Counts of the nodes in integers and in floating point.

    Raises:
        UserError: If the file is quantized already, has no node for a layer
            that was trained for INT8, or a range was never learned.
    """
    import onnx

    exported = onnx.load(path)
    check_float(exported, path)
    writer = _Writer(exported)
    names = _Names(model, writer.arrays)
    left = dict(names.trained)
    for index, node in enumerate(exported.graph.node):
        name = names.layer_of(node)
        if name not in names.trained:
            continue
        layer = names.trained[name]
        left.pop(name, None)
        source = _scale(layer._modules[INPUT], f'{name}.{INPUT}')
        target = None
        holder = getattr(layer, 'output_holder', None)
        if holder is not None:
            quantizer = model.get_submodule(holder)._modules[OUTPUT]
            target = _scale(quantizer, f'{holder}.{OUTPUT}')
        writer.quantize(index, source, target, layer._modules[WEIGHT])
    if left:
        raise UserError(
            f'the export has no node for layers that were trained for INT8: '
            f'{some(list(left))}; in floating point they would compute '
            'something else'
        )
    writer.finish()
    shield_float_(exported)
    onnx.checker.check_model(exported)
    onnx.save(exported, out)
    return layers_of(exported)


class _Names:
    """Finds the layer that a node of an exported file computes.

    Args:
        model: The network with its quantizers.
        arrays: The file's weights by name.

    Attributes:
        trained: Names -> layers with quantizers.
    """

    def __init__(
        self, model: nn.Module, arrays: Dict[str, np.ndarray]
    ) -> None:
        self._arrays = arrays
        self.trained = {
            name: layer
            for name, layer in quantizable_layers(model).items()
            if WEIGHT in layer._modules
        }
        first = {layer: name for name, layer in self.trained.items()}
        #: A shared layer stands under several names.
        self._aliases = {
            name: first[module]
            for name, module in model.named_modules(remove_duplicate=False)
            if module in first
        }
        # Exporters transpose the weight of a matrix product, and rename it.
        self._transposed: Dict[bytes, List[str]] = {}
        for name, layer in self.trained.items():
            if isinstance(layer, nn.Linear):
                weight = layer.weight.detach().float().cpu().numpy().T
                self._transposed.setdefault(_key(weight), []).append(name)

    def layer_of(self, node) -> str:
        """Name of a node's layer, by its weight; empty if it has none."""
        if node.op_type == 'MatMul' and node.input[1] in self._arrays:
            names = self._transposed.get(_key(self._arrays[node.input[1]]), [])
            # Layers of equal weights come in the network's order.
            return names.pop(0) if len(names) > 1 else ''.join(names)
        if node.op_type not in ('Conv', 'Gemm'):
            return ''
        name = node.input[1]
        if not name.startswith(PREFIX) or not name.endswith('.weight'):
            return ''
        return self._aliases.get(name[len(PREFIX) : -len('.weight')], '')


def _key(array: np.ndarray) -> bytes:
    """What tells apart the weights of different layers."""
    return repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()


def _scale(quantizer: nn.Module, name: str) -> Scale:
    low = quantizer.activation_post_process.min_val
    if not low.numel() or not torch.isfinite(low).all():
        raise UserError(
            f'{name} has seen no data: train with the quantizers turned on '
            'before writing the file'
        )
    return Scale(quantizer.scale.item(), int(quantizer.zero_point.item()))


class _Writer:
    """Puts nodes of a graph between quantizing and dequantizing nodes."""

    def __init__(self, model) -> None:
        from onnx import numpy_helper

        self.graph = model.graph
        self.arrays = {
            i.name: numpy_helper.to_array(i) for i in self.graph.initializer
        }
        self._outputs = {output.name for output in self.graph.output}
        self._before: Dict[int, List] = {}
        self._after: Dict[int, List] = {}
        self._made: Dict[tuple, str] = {}
        self._new = []

    def quantize(
        self,
        index: int,
        source: Scale,
        target: Optional[Scale],
        quantizer: WeightQuantizer,
    ) -> None:
        """Quantize a node's input, weight, bias and perhaps its output.

        Args:
            index: Index of the node in the graph: a ``Conv``, ``Gemm`` or
                ``MatMul``.
            source: Scale of the node's input.
            target: Scale of the node's output; None leaves it in float.
            quantizer: Quantizer of the weight.
        """
        node = self.graph.node[index]
        before = self._before.setdefault(index, [])
        weight_name = node.input[1]
        bias_name = node.input[2] if len(node.input) > 2 else None
        node.input[0] = self._activation(node.input[0], source, before)
        axis, limit = 0, quantizer.quant_max
        if node.op_type != 'Conv':
            attributes = {a.name: a.i for a in node.attribute}
            axis = 0 if attributes.get('transB') else 1
        weight = self.arrays[weight_name]
        bias = self.arrays[bias_name] if bias_name else None
        scales = weight_scales(
            weight,
            bias,
            source.scale,
            limit,
            axis if quantizer.per_channel else None,
        )
        node.input[1] = self._constant(
            weight_name,
            weight,
            scales,
            np.int8,
            limit,
            axis,
            before,
            source.scale,
        )
        if bias is not None:
            node.input[2] = self._constant(
                bias_name,
                bias,
                scales * np.float32(source.scale),
                np.int32,
                2**31 - 1,
                0,
                before,
                source.scale,
            )
        last = self._bias_added(index) if node.op_type == 'MatMul' else index
        node = self.graph.node[last]
        if target is not None and node.output[0] not in self._outputs:
            name = node.output[0]
            node.output[0] = f'{name}_float'
            after = self._after.setdefault(last, [])
            self._pair(node.output[0], name, target, after)

    def _bias_added(self, index: int) -> int:
        """Index of the node that adds the bias to a product's result."""
        (result,) = self.graph.node[index].output
        readers = [
            i for i, n in enumerate(self.graph.node) if result in n.input
        ]
        if len(readers) == 1:
            node = self.graph.node[readers[0]]
            if node.op_type == 'Add' and set(node.input) & set(self.arrays):
                return readers[0]
        return index

    def finish(self) -> None:
        """Insert the new nodes in order, and drop unused weights."""
        nodes = []
        for index, node in enumerate(self.graph.node):
            nodes += self._before.get(index, [])
            nodes.append(node)
            nodes += self._after.get(index, [])
        copies = [type(node).FromString(n.SerializeToString()) for n in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        self.graph.initializer.extend(self._new)
        used = {name for node in copies for name in node.input}
        kept = [i for i in self.graph.initializer if i.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        del self.graph.value_info[:]

    def _activation(self, name: str, scale: Scale, nodes: List) -> str:
        key = (name, scale)
        if key not in self._made:
            count = sum(made[0] == name for made in self._made)
            result = f'{name}_DequantizeLinear_Output_{count}'
            self._pair(name, result, scale, nodes)
            self._made[key] = result
        return self._made[key]

    def _pair(self, name: str, result: str, scale: Scale, nodes: List) -> None:
        from onnx.helper import make_node

        constants = [
            self._add(f'{result}_scale', np.float32(scale.scale)),
            self._add(f'{result}_zero_point', np.uint8(scale.zero_point)),
        ]
        integers = f'{result}_quantized'
        nodes += [
            make_node('QuantizeLinear', [name, *constants], [integers]),
            make_node('DequantizeLinear', [integers, *constants], [result]),
        ]

    def _constant(
        self, name, values, scales, kind, limit, axis, nodes, key
    ) -> str:
        from onnx.helper import make_node

        if (name, key) in self._made:
            return self._made[name, key]
        shape = [1] * values.ndim
        if scales.ndim:
            shape[axis] = -1
        divisors = scales.astype(np.float64).reshape(shape)
        exact = values.astype(np.float64) / divisors
        integers = np.clip(np.rint(exact), -limit, limit).astype(kind)
        count = sum(made[0] == name for made in self._made)
        label = f'{name}_{count}' if count else name
        result = f'{label}_DequantizeLinear_Output'
        inputs = [
            self._add(f'{label}_quantized', integers),
            self._add(f'{label}_scale', scales.astype(np.float32)),
            self._add(f'{label}_zero_point', np.zeros(scales.shape, kind)),
        ]
        along = dict(axis=axis) if scales.ndim else {}
        nodes.append(make_node('DequantizeLinear', inputs, [result], **along))
        self._made[name, key] = result
        return result

    def _add(self, name: str, values) -> str:
        from onnx import numpy_helper

        array = np.asarray(values)
        self._new.append(numpy_helper.from_array(array, name))
        return name


def weight_scales(
    weight: np.ndarray,
    bias: Optional[np.ndarray],
    source: float,
    limit: int,
    axis: Optional[int] = 0,
) -> np.ndarray:
    """Choose the scales of a weight as torch's observers do.

    The bias is stored in 32 bits, in steps of this scale times the input's
    scale. A kernel that is almost zero would give steps too small for a large
    bias. Its scale is raised until the bias fits: beside such a bias the
    kernel is as good as zero.

    Args:
        weight: The weight, with the output channels along ``axis``.
        bias: The bias, shape (out,), or None.
        source: Scale of the layer's input.
        limit: Largest integer of a weight.
        axis: Axis of the output channels; None for one scale in all.

    Returns:
        numpy.ndarray: Shape (out,), or () for one scale; float32.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales = np.abs(weight).max(axis=others).astype(np.float32) / limit
    scales = np.maximum(scales, np.finfo(np.float32).eps)
    if bias is not None:
        room = np.float32(source) * (2**31 - 1) / 2
        largest = np.abs(bias) if axis is not None else np.abs(bias).max()
        scales = np.maximum(scales, largest / room)
    return np.asarray(scales, np.float32)
