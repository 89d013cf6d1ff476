# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The float ONNX file to quantize: exported from a checkpoint, or given."""

from __future__ import annotations

import copy
import json
import os
from typing import Any, NamedTuple, Optional, Tuple

from mmengine.runner import Runner
from torch import nn

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import check_regular
from mmdbb.files.formats import OWN
from mmdbb.mm.evaluation.images import default_size
from mmdbb.mm.export.formats import LARGEST_ONNX, METADATA
from mmdbb.mm.export.modules import is_detector
from mmdbb.mm.export.network import ExportOptions, write_network
from mmdbb.mm.outputs import Proof, Source
from mmdbb.mm.quantization.fake import remove_quantizers_
from mmdbb.mm.quantization.network import fill_network
from mmdbb.mm.quantization.onnx_static import check_float, check_weights
from mmdbb.mm.quantization.session import OnnxNetwork
from mmdbb.mm.structure import Structure, written_structure


class Merged(NamedTuple):
    """The network to quantize, in floating point.

    Attributes:
        path: Path of its ONNX file, blocks merged and norms folded.
        size: Height and width in pixels of the images that the file takes.
        trained: The network in PyTorch, with blocks and quantizers if it has
            any; None if the source is an ONNX file.
        structure: Structure to note in the INT8 file.
        weights: Weights that were taken from the source, such as the averaged
            ones; noted in the INT8 file too.
    """

    path: str
    size: Tuple[int, int]
    trained: Optional[nn.Module]
    structure: Structure
    weights: str


def merged_network(
    source: Source,
    runner: Runner,
    path: str,
    size: Optional[Tuple[int, int]] = None,
    seed: int = 0,
) -> Merged:
    """Write the float file of a source's network.

    Args:
        source: A trained checkpoint, with blocks or merged, or an ONNX file
            of the network in float32; and the config.
        runner: The config's runner; its network is filled with the
            checkpoint's weights.
        path: Path of the file to write.
        size: Height and width in pixels of the images that the file takes;
            by default the smallest that all images of the test set fit into.
        seed: Random seed for the choice of that image.

    Raises:
        UserError: If the source is wrong, or the network cannot be exported.
    """
    if source.checkpoint.endswith('.onnx'):
        return _given_file(source.checkpoint, path, size)
    return _exported(source, runner, path, size, seed)


def _given_file(
    source: str, path: str, size: Optional[Tuple[int, int]]
) -> Merged:
    """Check the user's ONNX file, and copy it to ``path``."""
    import onnx

    if not os.path.exists(source):
        raise UserError(f'no such ONNX file: {source}')
    check_regular(source, 'ONNX file')
    weight = os.path.getsize(source)
    if weight > LARGEST_ONNX:
        raise UserError(
            f'{source} has {weight / 1e9:.2f} GB; an ONNX file holds '
            f'{LARGEST_ONNX / 1e9:.2f} GB at most'
        )
    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as error:  # protobuf has errors of its own
        raise UserError(f'{source} is not an ONNX file') from error
    check_float(model, source)
    check_weights(model, source)
    onnx.save(model, path)
    takes = OnnxNetwork(path).size
    if size not in (None, takes):
        raise UserError(
            f'{source} takes images of {takes} pixels, got --image-size {size}'
        )
    structure = written_structure(dict(meta={OWN: noted(model)}))
    return Merged(
        path=path,
        size=takes,
        trained=None,
        structure=structure or Structure.FUSED,
        weights='the only ones',
    )


def _exported(
    source: Source,
    runner: Runner,
    path: str,
    size: Optional[Tuple[int, int]],
    seed: int,
) -> Merged:
    """Load the checkpoint into the runner's network, and export that."""
    loaded = source.read()
    size = size or default_size(source.cfg, runner.model, seed)
    trained = fill_network(runner.model, loaded, source.checkpoint, size)
    runner.model = trained
    network = copy.deepcopy(trained)
    remove_quantizers_(network)
    write_network(
        network,
        path,
        ExportOptions(head=is_detector(network)),
        Proof(image_size=size),
    )
    pruned = written_structure(loaded) is Structure.PRUNED
    return Merged(
        path=path,
        size=size,
        trained=trained,
        structure=Structure.PRUNED if pruned else Structure.FUSED,
        weights=loaded['weights'],
    )


def noted(model: Any) -> dict:
    """The notes that mmdbb wrote into an ONNX model; empty if none.

    Args:
        model: The model, as ``onnx.load`` returned it.
    """
    props = {p.key: p.value for p in model.metadata_props}
    try:
        own = json.loads(props.get(METADATA, '{}'))
    except ValueError:  # another program's entry of the same name
        return {}
    return own if isinstance(own, dict) else {}
