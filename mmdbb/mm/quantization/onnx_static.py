# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Static quantization of an ONNX file, by ``onnxruntime.quantization``.

The file written has the QDQ form: ``QuantizeLinear`` and ``DequantizeLinear``
nodes stand around each node that runs in integers. Weights are int8 with one
scale a channel by default, activations uint8 with one scale a tensor.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
from torch import Tensor

from mmdbb.errors import UserError, require_packages
from mmdbb.files.sources import shown
from mmdbb.mm.evaluation.images import check_calibration
from mmdbb.mm.quantization.onnx_layers import (
    WEIGHTED,
    float_nodes,
    layer_nodes,
    name_nodes_,
    part_weights_,
    shield_float_,
)

#: Packages needed to write and run INT8 files.
PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
METHODS = ('minmax', 'entropy', 'percentile')
#: Operators that only a quantized file has.
QUANTIZED = (
    'QuantizeLinear',
    'DequantizeLinear',
    'DynamicQuantizeLinear',
    'ConvInteger',
    'MatMulInteger',
    'QLinearConv',
    'QLinearMatMul',
)
#: Norms lose too much in eight bits, and ONNX Runtime refuses to quantize
#: ``InstanceNormalization`` as exported from a group norm.
NOT_BY_DEFAULT = (
    'InstanceNormalization',
    'LayerNormalization',
    'BatchNormalization',
)
_DOMAINS = ('', 'ai.onnx', 'com.microsoft')
#: Images in a batch of the calibration.
_BATCH = 8
#: Share of the values, in percent, that method ``percentile`` does not clip.
_PERCENTILE = 99.99


class Layers(NamedTuple):
    """Counts of a file's nodes, in integers and in floating point.

    Attributes:
        quantized: Number of convolutions and matrix products that run in
            integers.
        left: Operators left in floating point -> numbers of their nodes.
    """

    quantized: int
    left: Dict[str, int]


def quantize_onnx(
    path: str,
    out: str,
    images: Tensor,
    method: str = 'minmax',
    per_channel: bool = True,
    reduce_range: bool = False,
    op_types: Optional[Sequence[str]] = None,
    kept: Sequence[str] = (),
) -> Layers:
    """Quantize an ONNX file to INT8.

    Args:
        path: Path of the file to read: an ONNX network in float32, its blocks
            merged.
        out: Path of the file to write.
        images: Normalised images (N, C, H, W) to calibrate with.
        method: How the range of activations is chosen; values outside are
            clipped. One of :data:`METHODS`: ``minmax`` clips none,
            ``entropy`` minimises the loss of information, ``percentile``
            clips a fixed share.
        per_channel: Whether each output channel of a weight has a scale of
            its own.
        reduce_range: Whether weights use seven bits, for processors whose
            eight-bit products saturate (x86 without VNNI).
        op_types: Operators to quantize; by default all that ONNX Runtime can
            quantize, except norms (:data:`NOT_BY_DEFAULT`).
        kept: Names of the layers to leave in float, of those that
            :func:`layers_in` returns. The operators without weights that read
            their results stay in float too. If all layers do, the file is the
            one given.

    Returns:
        Layers: Counts of the nodes that were quantized, and of the others.

    Raises:
        UserError: If an argument is wrong, the file is quantized already, or
            ONNX Runtime cannot quantize it.
    """
    require_packages('quantization', 'quantization', *PACKAGES)
    import onnx
    from onnxruntime import quantization as ort

    if method not in METHODS:
        raise UserError(
            f'method must be one of {", ".join(METHODS)}; got {method!r}'
        )
    check_calibration(images)
    model = onnx.load(path)
    check_float(model, path)
    op_types = _operators(model, path, op_types)
    options = dict(CalibPercentile=_PERCENTILE)
    name_nodes_(model)
    left = float_nodes(model, kept)
    if kept and set(kept) >= set(layer_nodes(model, op_types)):
        shutil.copyfile(path, out)
        return layers_of(model)
    part_weights_(model, left)
    try:
        with _quiet():
            ort.quantize_static(
                model,
                out,
                _reader(images, model.graph.input[0].name),
                quant_format=ort.QuantFormat.QDQ,
                op_types_to_quantize=op_types,
                per_channel=per_channel,
                reduce_range=reduce_range,
                nodes_to_exclude=left,
                activation_type=ort.QuantType.QUInt8,
                weight_type=ort.QuantType.QInt8,
                calibrate_method=dict(
                    minmax=ort.CalibrationMethod.MinMax,
                    entropy=ort.CalibrationMethod.Entropy,
                    percentile=ort.CalibrationMethod.Percentile,
                )[method],
                extra_options=options,
            )
    except Exception as error:  # ONNX Runtime raises errors of any type
        raise UserError(
            f'ONNX Runtime cannot quantize {path}: {type(error).__name__}: '
            f'{error}'
        ) from error
    written = onnx.load(out)
    if shield_float_(written):
        onnx.save(written, out)
    layers = layers_of(written)
    if not layers.quantized:
        raise UserError(
            f'nothing in {path} was quantized; its operators: '
            f'{", ".join(sorted({n.op_type for n in model.graph.node}))}'
        )
    return layers


def layers_in(
    path: str, op_types: Optional[Sequence[str]] = None
) -> List[str]:
    """Name the layers of a file that :func:`quantize_onnx` quantizes.

    Args:
        path: Path of an ONNX network in float32.
        op_types: Operators to quantize; None for all.

    Returns:
        list: Names of modules, in the file's order.
    """
    import onnx

    model = onnx.load(path)
    name_nodes_(model)
    return list(layer_nodes(model, op_types or WEIGHTED))


def check_float(model, path: str) -> None:
    """Refuse a file that is quantized already.

    Args:
        model: The file's ONNX model, as ``onnx.load`` returned it.
        path: The file's path, for the message.

    Raises:
        UserError: If the model has an operator of :data:`QUANTIZED`.
    """
    found = {node.op_type for node in model.graph.node} & set(QUANTIZED)
    if found:
        raise UserError(
            f'{path} is quantized already: it has {", ".join(sorted(found))}'
        )


def check_weights(model, path: str) -> None:
    """Refuse weights that are kept in another file, damaged or not finite.

    Args:
        model: The file's ONNX model, loaded without external data.
        path: The file's path, for the message.

    Raises:
        UserError: If the model has such a weight.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            raise UserError(
                f'{path} keeps the weights {shown(tensor.name)} in another '
                'file; save it with its weights inside'
            )
        try:
            finite = np.isfinite(onnx.numpy_helper.to_array(tensor)).all()
        except (TypeError, ValueError) as error:
            raise UserError(
                f'{path} is not an ONNX file: {shown(tensor.name)} is damaged'
            ) from error
        if not finite:
            raise UserError(
                f'{path} has values that are not finite: {shown(tensor.name)}'
            )


def layers_of(model) -> Layers:
    """Count the nodes of a QDQ file that run in integers, and the others.

    Args:
        model: The file's ONNX model.
    """
    dequantized = {
        output
        for node in model.graph.node
        if node.op_type == 'DequantizeLinear'
        for output in node.output
    }
    quantized, left = 0, {}
    for node in model.graph.node:
        if node.op_type in ('QuantizeLinear', 'DequantizeLinear'):
            continue
        if node.op_type in WEIGHTED:
            if set(node.input[:2]) <= dequantized:
                quantized += 1
                continue
        elif any(name in dequantized for name in node.input):
            continue
        left[node.op_type] = left.get(node.op_type, 0) + 1
    return Layers(quantized, left)


def _operators(
    model, path: str, op_types: Optional[Sequence[str]]
) -> List[str]:
    """Choose the operators to quantize, and check that there are any."""
    from onnxruntime.quantization.registry import (
        QDQRegistry,
        QLinearOpsRegistry,
    )

    known = sorted(set(QDQRegistry) | set(QLinearOpsRegistry))
    for name in op_types or ():
        if name not in known:
            raise UserError(
                f'ONNX Runtime cannot quantize the operator {name}; it can: '
                f'{", ".join(known)}'
            )
    for node in model.graph.node:
        if node.domain not in _DOMAINS:
            raise UserError(
                f'{path} has the operator {node.domain}.{node.op_type}, '
                'which ONNX Runtime can neither run nor quantize'
            )
    if not any(node.op_type in known for node in model.graph.node):
        raise UserError(f'{path} has no operator that can be quantized')
    return list(op_types or (n for n in known if n not in NOT_BY_DEFAULT))


def _reader(images: Tensor, name: str):
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images.split(_BATCH))

        def get_next(self):
            batch = next(self.batches, None)
            if batch is None:
                return None
            return {name: batch.contiguous().numpy()}

        def __len__(self) -> int:
            return -(-len(images) // _BATCH)

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # ONNX Runtime advises a preprocessing that the export has done already,
    # and prints progress.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logging.disable(before)
