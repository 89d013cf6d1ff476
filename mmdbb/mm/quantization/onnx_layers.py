# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which nodes of an ONNX file belong to which layer of the network.

A layer is a convolution or a product with a weight, by the name of its module
in the network. Exporters note at each node the modules that it was computed
in. Where a file has no such notes, the name of the weight tells, and where
that does not, the name of the node.
"""

from __future__ import annotations

import ast
import fnmatch
import itertools
from typing import Dict, Iterator, List, Sequence, Set

from mmdbb.errors import UserError
from mmdbb.files.sources import some
from mmdbb.mm.export.formats import SCOPES

#: Operators whose second input is a weight.
WEIGHTED = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
#: The export wraps the network in a module that keeps it as its attribute
#: ``network``, so names in an exported file start so.
PREFIX = 'network.'
#: Names listed in a message.
_LISTED = 60


def name_nodes_(model) -> None:
    """Give names to nodes that have none, or one that another node has.

    Args:
        model: The file's ONNX model; changed in place.
    """
    taken = {node.name for node in model.graph.node}
    seen = {''}
    for index, node in enumerate(model.graph.node):
        if node.name in seen:
            names = (f'{node.op_type}_{i}' for i in itertools.count(index))
            node.name = next(name for name in names if name not in taken)
            taken.add(node.name)
        seen.add(node.name)


def layer_nodes(
    model, op_types: Sequence[str] = WEIGHTED
) -> Dict[str, List[str]]:
    """Find the layers of a file.

    Args:
        model: The file's ONNX model, its nodes named by :func:`name_nodes_`.
        op_types: Operators that count; those without weights never do.

    Returns:
        dict: Names of the layers, in the file's order -> names of their
        nodes. A layer that the network runs twice has two nodes.
    """
    found: Dict[str, List[str]] = {}
    computed = _computed(model)
    for node in model.graph.node:
        if node.op_type in op_types and _has_weight(node, computed):
            found.setdefault(layer_name(node), []).append(node.name)
    return found


def layer_name(node) -> str:
    """Name of the layer that a node belongs to.

    Args:
        node: A node of an ONNX graph.
    """
    for note in node.metadata_props:
        if note.key == SCOPES:
            # The modules from the outermost on, then the operation.
            scopes = ast.literal_eval(note.value)[:-1]
            if scopes and scopes[-1].startswith(PREFIX):
                return scopes[-1][len(PREFIX) :]
    weight = node.input[1] if len(node.input) > 1 else ''
    if node.op_type in WEIGHTED and weight.endswith('.weight'):
        name = weight[: -len('.weight')]
        return name[len(PREFIX) :] if name.startswith(PREFIX) else name
    return node.name


def matching(names: Sequence[str], patterns: Sequence[str]) -> List[str]:
    """Choose layers by patterns.

    Args:
        names: Names of all layers.
        patterns: Names of layers or of modules that hold layers; ``*`` stands
            for any characters, ``?`` for one.

    Returns:
        list: The names that a pattern matches, in their order.

    Raises:
        UserError: If a pattern matches no layer.

    Examples:
        >>> matching(['stage.0', 'stage.1', 'head.fc'], ['*.0', 'head'])
        ['stage.0', 'head.fc']
    """
    found: Set[str] = set()
    for pattern in patterns:
        chosen = {n for n in names if _matches(n, pattern)}
        if not chosen:
            raise UserError(
                f'--keep-float {pattern} matches no layer; the layers: '
                f'{some(list(names), _LISTED)}'
            )
        found |= chosen
    return [name for name in names if name in found]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a layer, or a module that it is in."""
    parents = itertools.accumulate(name.split('.'), '{}.{}'.format)
    return any(fnmatch.fnmatchcase(parent, pattern) for parent in parents)


def float_nodes(model, kept: Sequence[str]) -> List[str]:
    """Name the nodes that compute in float if some layers do.

    They are the nodes of these layers, and those without a weight, such as a
    sum, that read the result of one, directly or through others.

    Args:
        model: The file's ONNX model, its nodes named by :func:`name_nodes_`.
        kept: Names of the layers that stay in float.
    """
    kept, tensors, found = set(kept), set(), []
    computed = _computed(model)
    for node in model.graph.node:
        own = layer_name(node) in kept
        if own or (
            not _has_weight(node, computed) and tensors & set(node.input)
        ):
            found.append(node.name)
            tensors.update(node.output)
    return found


def part_weights_(model, nodes: Sequence[str]) -> None:
    """Give nodes copies of the weights that others read too.

    ONNX Runtime quantizes a weight for all nodes that read it, also for those
    that it is told to leave. Exporters store equal weights once.

    Args:
        model: The file's ONNX model; changed in place.
        nodes: Names of the nodes that compute in float.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    shared = {
        name
        for node in model.graph.node
        if node.name not in nodes
        for name in _inputs(node)
    }
    copied = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if node.name in nodes and name in shared and name in weights:
                if name not in copied:
                    copied[name] = model.graph.initializer.add()
                    copied[name].CopyFrom(weights[name])
                    copied[name].name = f'{name}_float'
                node.input[place] = copied[name].name


def shield_float_(model) -> int:
    """Keep ONNX Runtime from quantizing layers that a file has in float.

    Newer versions quantize the weight of each convolution that stands
    between dequantized input and quantized output, when they load the file
    (https://github.com/microsoft/onnxruntime/pull/22969). A ``Clip`` without
    limits, which changes no number, comes between such a layer and its input.

    Args:
        model: The ONNX model of a quantized file; changed in place.

    Returns:
        int: Number of layers that needed it.
    """
    from onnx.helper import make_node

    weights = {tensor.name for tensor in model.graph.initializer}
    dequantized = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == 'DequantizeLinear'
    }
    nodes, count = [], 0
    for node in model.graph.node:
        if (
            node.op_type in WEIGHTED
            and node.input[0] in dequantized
            and node.input[1] in weights
        ):
            shielded = f'{node.output[0]}_input_float'
            clip = make_node('Clip', [node.input[0]], [shielded], shielded)
            nodes.append(clip)
            node.input[0] = shielded
            count += 1
        nodes.append(node)
    copies = [type(node).FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return count


def _has_weight(node, computed: Set[str]) -> bool:
    return node.op_type in WEIGHTED and node.input[1] not in computed


def _computed(model) -> Set[str]:
    """Names of the tensors that depend on the images."""
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {i.name for i in model.graph.input} - weights
    for node in model.graph.node:
        if found & set(_inputs(node)):
            found.update(node.output)
    return found


def _inputs(node) -> Iterator[str]:
    """A node's inputs, and those of the graphs inside of it."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _inputs(inner)
