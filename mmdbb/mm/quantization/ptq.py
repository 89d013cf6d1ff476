# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to an INT8 file whose accuracy is known."""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from mmengine.runner import Runner
from torch import nn

from mmdbb.errors import UserError, require_packages
from mmdbb.files.checkpoints import check_regular
from mmdbb.files.formats import OWN
from mmdbb.mm.engine.measure import interleaved_latency
from mmdbb.mm.evaluation.figures import Figure, evaluate, quiet_runner
from mmdbb.mm.evaluation.images import Calibration, first_size
from mmdbb.mm.export.formats import METADATA
from mmdbb.mm.export.modules import Detector, export_module
from mmdbb.mm.export.network import ExportOptions, write_network
from mmdbb.mm.outputs import Proof, Source, writing
from mmdbb.mm.quantization.fake import (
    WeightQuantizer,
    quantizers,
    remove_quantizers_,
)
from mmdbb.mm.quantization.network import fill_network
from mmdbb.mm.quantization.onnx_static import (
    PACKAGES,
    Layers,
    check_float,
    check_weights,
    quantize_onnx,
)
from mmdbb.mm.quantization.qdq import write_qdq
from mmdbb.mm.quantization.session import OnnxNetwork
from mmdbb.mm.structure import Structure, written_structure


class Stage(NamedTuple):
    """A network on its way to INT8.

    Attributes:
        name: ``trained``, ``merged`` or ``int8``.
        figure: What the config's evaluator says of it; None if it was not
            asked.
        size: Bytes of its weights or file.
        latency: Median seconds of one image on one thread.
    """

    name: str
    figure: Optional[Figure]
    size: int
    latency: float


class Quantized(NamedTuple):
    """What :func:`quantize_checkpoint` wrote.

    Attributes:
        path: The INT8 file.
        stages: The network before, between and after.
        layers: What of it runs in integers.
        images: How many images it was calibrated with; 0 where the ranges
            were trained.
        image_size: Height and width in pixels that the file takes.
        drop: By how many hundredths the figure fell; None if not evaluated.
    """

    path: str
    stages: List[Stage]
    layers: Layers
    images: int
    image_size: Tuple[int, int]
    drop: Optional[float]


class QuantizeOptions(NamedTuple):
    """How a network is quantized after training, see :func:`quantize_onnx`.

    Attributes:
        calibration: Which images to calibrate with.
        method: Where activations are cut off: ``minmax``, ``entropy`` or
            ``percentile``.
        per_channel: Whether weights have a scale a channel.
        reduce_range: Whether weights use seven bits.
        op_types: Operators to quantize, by default all.
    """

    calibration: Calibration = Calibration()
    method: str = 'minmax'
    per_channel: bool = True
    reduce_range: bool = False
    op_types: Optional[Sequence[str]] = None


def quantize_checkpoint(
    source: Source,
    out: str,
    options: Optional[QuantizeOptions] = None,
    image_size: Optional[Tuple[int, int]] = None,
    metric: Optional[str] = None,
    max_drop: Optional[float] = 1.0,
    evaluated: bool = True,
    overwrite: bool = False,
) -> Quantized:
    """Merge, export, quantize, evaluate; write the file if it is as good.

    Args:
        source: A trained checkpoint, with blocks or merged, or after
            quantization-aware training: then the ranges are those that were
            trained. Or an ONNX file of the network in float32. Its config has
            data sets and an evaluator.
        out: Path of the INT8 file, ``*.onnx``.
        options: How to quantize.
        image_size: Height and width in pixels that the file takes; by default
            those of the first image of the test set.
        metric: The evaluator's figure to compare, by default its main one.
        max_drop: Largest fall of the figure, in hundredths, from the first
            network to the INT8 one; None for any.
        evaluated: Whether to run the evaluator at all.
        overwrite: Whether ``out`` may be replaced.

    Returns:
        Quantized: The file and how good it is.

    Raises:
        UserError: If an input is wrong, the network cannot be quantized, or
            the figure falls by more than ``max_drop``. Nothing is written.
    """
    require_packages('quantization', 'quantization', *PACKAGES)
    options = options or QuantizeOptions()
    if not out.endswith('.onnx'):
        raise UserError(f'the output must end in .onnx, got {out}')
    with writing(source, out, overwrite=overwrite) as drafts:
        (draft,) = drafts.paths
        path = str(Path(draft).parent / 'merged.onnx')
        with quiet_runner(source.cfg) as runner:
            if source.checkpoint.endswith('.onnx'):
                merged = _given_file(source.checkpoint, path, image_size)
            else:
                seed = options.calibration.seed
                merged = _exported(source, runner, path, image_size, seed)
            integers = _quantized(source, runner, merged, draft, options)
            stages = _stages(runner, merged, draft, metric, evaluated)
        drop = _drop(stages)
        if drop is not None and max_drop is not None and not drop <= max_drop:
            first, last = stages[0].figure, stages[-1].figure
            raise UserError(
                f'{last.name} falls by {drop:.2f} points, from '
                f'{first.points:.2f} to {last.points:.2f}, more than '
                f'--max-drop {max_drop:g}; nothing written'
            )
        notes = source.notes(
            merged.structure,
            merged.weights,
            quantization=dict(
                method=integers.method,
                images=integers.images,
                per_channel=integers.per_channel,
                points={s.name: s.figure.points for s in stages if s.figure},
            ),
        )
        _note(draft, notes)
    return Quantized(
        path=out,
        stages=stages,
        layers=integers.layers,
        images=integers.images,
        image_size=merged.size,
        drop=drop,
    )


class _Merged(NamedTuple):
    """The network to quantize, in floating point.

    Attributes:
        path: Its ONNX file, blocks merged and norms folded.
        size: Height and width in pixels of the images that the file takes.
        trained: The network in torch, with blocks and quantizers if it has
            any; None where the source is an ONNX file.
        structure: What is noted of the structure.
        weights: Which weights of the source it has.
    """

    path: str
    size: Tuple[int, int]
    trained: Optional[nn.Module]
    structure: Structure
    weights: str


class _Integers(NamedTuple):
    """How the INT8 file came about.

    Attributes:
        layers: What of it runs in integers.
        method: Where activations were cut off; ``trained`` if the ranges were
            trained.
        images: How many images it was calibrated with.
        per_channel: Whether weights have a scale a channel.
    """

    layers: Layers
    method: str
    images: int
    per_channel: bool


def _given_file(
    source: str, path: str, size: Optional[Tuple[int, int]]
) -> _Merged:
    """Check an ONNX file that was given, and take a copy."""
    import onnx

    if not os.path.exists(source):
        raise UserError(f'no such ONNX file: {source}')
    check_regular(source, 'ONNX file')
    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as error:  # of protobuf's own kinds
        raise UserError(f'{source} is not an ONNX file') from error
    check_float(model, source)
    check_weights(model, source)
    onnx.save(model, path)
    takes = OnnxNetwork(path).size
    if size not in (None, takes):
        raise UserError(
            f'{source} takes images of {takes} pixels, got --image-size {size}'
        )
    noted = written_structure(dict(meta={OWN: _noted(model)}))
    return _Merged(
        path=path,
        size=takes,
        trained=None,
        structure=noted or Structure.FUSED,
        weights='the only ones',
    )


def _exported(
    source: Source,
    runner: Runner,
    path: str,
    size: Optional[Tuple[int, int]],
    seed: int,
) -> _Merged:
    """Load the checkpoint into the runner's network, and export that."""
    loaded = source.read()
    trained = fill_network(runner.model, loaded, source.checkpoint)
    runner.model = trained
    size = size or first_size(source.cfg, trained, seed)
    network = copy.deepcopy(trained)
    remove_quantizers_(network)
    head = isinstance(export_module(network), Detector)
    write_network(
        network, path, ExportOptions(head=head), Proof(image_size=size)
    )
    pruned = written_structure(loaded) is Structure.PRUNED
    return _Merged(
        path=path,
        size=size,
        trained=trained,
        structure=Structure.PRUNED if pruned else Structure.FUSED,
        weights=loaded['weights'],
    )


def _quantized(
    source: Source,
    runner: Runner,
    merged: _Merged,
    draft: str,
    options: QuantizeOptions,
) -> _Integers:
    """Write the INT8 file."""
    found = [] if merged.trained is None else list(quantizers(merged.trained))
    if found:
        weights = [q for q in found if isinstance(q, WeightQuantizer)]
        return _Integers(
            layers=write_qdq(merged.path, draft, merged.trained),
            method='trained',
            images=0,
            per_channel=weights[0].per_channel,
        )
    images = options.calibration.images(source.cfg, runner.model, merged.size)
    layers = quantize_onnx(
        merged.path,
        draft,
        images,
        options.method,
        options.per_channel,
        options.reduce_range,
        options.op_types,
    )
    return _Integers(
        layers=layers,
        method=options.method,
        images=len(images),
        per_channel=options.per_channel,
    )


def _stages(
    runner: Runner,
    merged: _Merged,
    draft: str,
    metric: Optional[str],
    evaluated: bool,
) -> List[Stage]:
    """Evaluate and measure what there is, the INT8 file last."""
    networks = dict(merged=OnnxNetwork(merged.path), int8=OnnxNetwork(draft))
    sizes = {n: os.path.getsize(f.path) for n, f in networks.items()}
    if merged.trained is not None:
        networks = dict(trained=None, **networks)
        tensors = merged.trained.state_dict().values()
        sizes['trained'] = sum(t.numel() * t.element_size() for t in tensors)
    figures = {
        name: evaluate(runner, network, metric) if evaluated else None
        for name, network in networks.items()
    }
    seconds = _seconds(merged, networks)
    return [
        Stage(name, figures[name], sizes[name], seconds[name])
        for name in networks
    ]


def _seconds(
    merged: _Merged, networks: Dict[str, Optional[OnnxNetwork]]
) -> Dict[str, float]:
    image = torch.zeros(1, 3, *merged.size)
    calls: List[Callable] = []
    for network in networks.values():
        if network is None:
            trained = merged.trained.eval()
            head = isinstance(export_module(trained), Detector)
            device = next(trained.parameters()).device
            call, x = export_module(trained, head), image.to(device)
        else:
            call, x = OnnxNetwork(network.path, threads=1), image
        calls.append(functools.partial(call, x))
    return dict(zip(networks, interleaved_latency(calls)))


def _drop(stages: List[Stage]) -> Optional[float]:
    first, last = stages[0].figure, stages[-1].figure
    return None if first is None else first.points - last.points


def _noted(model: Any) -> dict:
    """What an ONNX model says of itself, if mmdbb wrote it."""
    props = {p.key: p.value for p in model.metadata_props}
    try:
        own = json.loads(props.get(METADATA, '{}'))
    except ValueError:  # another program's, of the same name
        return {}
    return own if isinstance(own, dict) else {}


def _note(path: str, notes: dict) -> None:
    """Write into an INT8 file what is known of it, and read it again."""
    import onnx

    model = onnx.load(path)
    props = {p.key: p.value for p in model.metadata_props}
    props[METADATA] = json.dumps({**_noted(model), **notes})
    onnx.helper.set_model_props(model, props)
    onnx.save(model, path)
    if onnx.load(path) != model:
        raise UserError(
            f'{os.path.basename(path)} is not read as it was written; '
            'nothing written'
        )
