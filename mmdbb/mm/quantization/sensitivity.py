# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Report how much each layer's rounding changes the outputs of a network."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from mmdbb.errors import require_packages
from mmdbb.mm.evaluation.figures import quiet_runner
from mmdbb.mm.outputs import Source, writing
from mmdbb.mm.quantization.merged import merged_network
from mmdbb.mm.quantization.onnx_static import PACKAGES
from mmdbb.mm.quantization.post_training import PostTraining, QuantizeOptions
from mmdbb.mm.quantization.session import OnnxNetwork

_BATCH = 8


class LayerError(NamedTuple):
    """What happens to the outputs if one layer alone computes in integers.

    Attributes:
        name: Name of the layer.
        error: Error of the output that changes most: the root of its mean
            square, divided by that of the output in float.
    """

    name: str
    error: float


class Sensitivity(NamedTuple):
    """A report of all layers.

    Attributes:
        path: Path of the file with the report, JSON.
        layers: One entry for each layer, the largest error first.
        images: Number of images that the outputs were compared on.
    """

    path: str
    layers: List[LayerError]
    images: int


def report_sensitivity(
    source: Source,
    out: str,
    options: Optional[QuantizeOptions] = None,
    image_size: Optional[Tuple[int, int]] = None,
    overwrite: bool = False,
) -> Sensitivity:
    """Quantize one layer at a time, and write what that does to the outputs.

    Args:
        source: A trained checkpoint, with blocks or merged, or an ONNX file
            of the network in float32; and a config with data sets and an
            evaluator.
        out: Path of the report, JSON.
        options: How to quantize, and on how many images to compare.
        image_size: Height and width in pixels of the images; by default the
            smallest that all images of the test set fit into.
        overwrite: Whether an existing ``out`` may be replaced.

    Returns:
        Sensitivity: The report. Layers that ``options.keep_float`` names are
        left out.

    Raises:
        UserError: If an input is wrong, or the network cannot be quantized or
            was trained for INT8. Nothing is written then.
    """
    require_packages('quantization', 'quantization', *PACKAGES)
    options, out = options or QuantizeOptions(), os.fspath(out)
    with writing(source, out, overwrite=overwrite) as drafts:
        (draft,) = drafts.paths
        path = str(Path(draft).parent / 'merged.onnx')
        with quiet_runner(source.config) as runner:
            seed = options.calibration.seed
            merged = merged_network(source, runner, path, image_size, seed)
            quantizer = PostTraining(source, runner, merged, options)
            layers = layer_errors(quantizer)
        notes = source.notes(
            merged.structure,
            merged.weights,
            method=options.method,
            per_channel=options.per_channel,
            reduce_range=options.reduce_range,
            images=len(quantizer.probes),
            layers=[layer._asdict() for layer in layers],
        )
        Path(draft).write_text(f'{json.dumps(notes, indent=1)}\n')
    return Sensitivity(out, layers, len(quantizer.probes))


def layer_errors(quantizer: PostTraining) -> List[LayerError]:
    """Quantize one layer at a time, and compare the outputs with float.

    ONNX Runtime runs all files.

    Args:
        quantizer: The network, and how to quantize it.

    Returns:
        list: One entry for each layer that may be quantized, the largest
        error first.
    """
    images, names = quantizer.probes, quantizer.names
    expected = _outputs(quantizer.path, images)
    found = []
    with tempfile.TemporaryDirectory(prefix='mmdbb-') as folder:
        draft = os.path.join(folder, 'one.onnx')
        for name in names:
            quantizer.write(draft, [other for other in names if other != name])
            error = max(map(_error, _outputs(draft, images), expected))
            found.append(LayerError(name, error))
    return sorted(found, key=lambda layer: -layer.error)


def _outputs(path: str, images: Tensor) -> List[Tensor]:
    network = OnnxNetwork(path)
    batches = [network(batch) for batch in images.split(_BATCH)]
    return [torch.cat(parts).double() for parts in zip(*batches)]


def _error(found: Tensor, expected: Tensor) -> float:
    size = expected.norm().clamp_min(1e-300)
    error = ((found - expected).norm() / size).item()
    # A NaN is worse than any number.
    return math.inf if math.isnan(error) else error
