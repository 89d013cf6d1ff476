# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Turn a trained checkpoint into an INT8 file, and measure its accuracy."""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import (
    Any,
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
from mmdbb.mm.data_flow import channels_of
from mmdbb.mm.engine.measure import interleaved_latency
from mmdbb.mm.evaluation.figures import evaluate, quiet_runner
from mmdbb.mm.evaluation.images import Calibration, first_size
from mmdbb.mm.evaluation.metric import Figure, Metric, describe_fall, fall
from mmdbb.mm.evaluation.substitutes import TorchNetwork
from mmdbb.mm.export.formats import LARGEST_ONNX, METADATA
from mmdbb.mm.export.modules import is_detector
from mmdbb.mm.export.network import ExportOptions, write_network
from mmdbb.mm.outputs import Proof, Source, writing
from mmdbb.mm.quantization.fake import quantizers, remove_quantizers_
from mmdbb.mm.quantization.network import fill_network
from mmdbb.mm.quantization.onnx_static import (
    PACKAGES,
    Layers,
    check_float,
    check_weights,
    quantize_onnx,
)
from mmdbb.mm.quantization.qdq import write_qdq
from mmdbb.mm.quantization.quantizers import WeightQuantizer
from mmdbb.mm.quantization.session import OnnxNetwork
from mmdbb.mm.structure import Structure, written_structure


class QuantizationStage(NamedTuple):
    """The network's accuracy, size and speed after one step to INT8.

    Attributes:
        name: The network: ``trained`` in PyTorch, ``merged`` as a float ONNX
            file, or ``int8``.
        figure: Result of the config's evaluator; None if it did not run.
        size: Bytes of the weights in PyTorch, or of the file.
        latency: Median seconds for one image on one thread.
    """

    name: str
    figure: Optional[Figure]
    size: int
    latency: float


class Quantized(NamedTuple):
    """Result of :func:`quantize_checkpoint`: the file, and how good it is.

    Attributes:
        path: Path of the INT8 file.
        stages: Accuracy, size and speed of the trained network (if a
            checkpoint was given), of the merged one and of the INT8 one.
        layers: Counts of the nodes in integers and in floating point.
        images: Number of calibration images; 0 if the ranges were trained.
        image_size: Height and width in pixels of the images that the file
            takes.
        drop: How much the evaluator's figure fell from the first stage to
            the last, see :func:`mmdbb.mm.evaluation.metric.fall`; None if it
            was not evaluated.
    """

    path: str
    stages: List[QuantizationStage]
    layers: Layers
    images: int
    image_size: Tuple[int, int]
    drop: Optional[float]


class QuantizeOptions(NamedTuple):
    """How to quantize a network after training, see :func:`quantize_onnx`.

    A checkpoint of quantization-aware training has its own ranges and scales,
    which are used instead.

    Attributes:
        calibration: Images that the ranges of activations are learned from.
        method: How these ranges are chosen: ``minmax``, ``entropy`` or
            ``percentile``.
        per_channel: Whether each output channel of a weight has a scale of
            its own.
        reduce_range: Whether weights use seven bits, for x86 processors
            without VNNI.
        op_types: ONNX operators to quantize; by default all that ONNX Runtime
            can quantize, except norms.
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
    metric: Optional[Metric] = None,
    max_drop: Optional[float] = 1.0,
    evaluated: bool = True,
    overwrite: bool = False,
) -> Quantized:
    """Merge a network, export and quantize it, and evaluate each stage.

    The file is written only if its accuracy falls by no more than
    ``max_drop``.

    Args:
        source: A trained checkpoint, with blocks or merged, or an ONNX file
            of the network in float32; and a config with data sets and an
            evaluator. A checkpoint of quantization-aware training brings its
            ranges, so nothing is calibrated.
        out: Path of the INT8 file, ``*.onnx``.
        options: How to quantize.
        image_size: Height and width in pixels of the images that the file
            takes; by default those of the first image of the test set.
        metric: The evaluator's figure to compare; by default its main one.
        max_drop: Largest fall of the figure allowed, in points (hundredths),
            from the first stage to the last; None allows any. If the
            figure's unit is not known, in per cent of its first value.
        evaluated: Whether to run the evaluator. If not, ``max_drop`` is
            ignored.
        overwrite: Whether an existing ``out`` may be replaced.

    Returns:
        Quantized: The file, and how good it is.

    Raises:
        UserError: If an input is wrong, the network cannot be quantized, or
            the figure falls by more than ``max_drop``. Nothing is written
            then.
    """
    require_packages('quantization', 'quantization', *PACKAGES)
    options, out = options or QuantizeOptions(), os.fspath(out)
    metric = metric or Metric()
    metric.check()
    if not out.endswith('.onnx'):
        raise UserError(f'the output must end in .onnx, got {out}')
    with writing(source, out, overwrite=overwrite) as drafts:
        (draft,) = drafts.paths
        path = str(Path(draft).parent / 'merged.onnx')
        with quiet_runner(source.config) as runner:
            if source.checkpoint.endswith('.onnx'):
                merged = _given_file(source.checkpoint, path, image_size)
            else:
                seed = options.calibration.seed
                merged = _exported(source, runner, path, image_size, seed)
            integers = _quantized(source, runner, merged, draft, options)
            stages = _stages(runner, merged, draft, metric, evaluated)
        drop = _drop(stages)
        if drop is not None and max_drop is not None and not drop <= max_drop:
            what = describe_fall(stages[0].figure, stages[-1].figure)
            raise UserError(
                f'{what}, more than --max-drop {max_drop:g}; nothing written'
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


class _Integers(NamedTuple):
    """How the INT8 file was made.

    Attributes:
        layers: Counts of the nodes in integers and in floating point.
        method: How the ranges of activations were chosen; ``trained`` if
            training learned them.
        images: Number of calibration images; 0 if the ranges were trained.
        per_channel: Whether each output channel of a weight has a scale of
            its own.
    """

    layers: Layers
    method: str
    images: int
    per_channel: bool


def _given_file(
    source: str, path: str, size: Optional[Tuple[int, int]]
) -> _Merged:
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
    size = size or first_size(source.cfg, runner.model, seed)
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
    """Write the INT8 file, with trained ranges if there are any."""
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
    metric: Metric,
    evaluated: bool,
) -> List[QuantizationStage]:
    """Evaluate and time each network that there is, the INT8 file last.

    All of them see the same images, padded to the size that the file takes.
    """
    networks = dict(merged=OnnxNetwork(merged.path), int8=OnnxNetwork(draft))
    sizes = {n: os.path.getsize(f.path) for n, f in networks.items()}
    timed = {n: OnnxNetwork(f.path, threads=1) for n, f in networks.items()}
    if merged.trained is not None:
        own = TorchNetwork(merged.trained, merged.size)
        networks = dict(trained=own, **networks)
        # Without quantizers, which are there for the training alone.
        plain = copy.deepcopy(merged.trained)
        remove_quantizers_(plain)
        timed = dict(trained=TorchNetwork(plain, merged.size), **timed)
        tensors = plain.state_dict().values()
        sizes['trained'] = sum(t.numel() * t.element_size() for t in tensors)
    figures: Dict[str, Optional[Figure]] = dict.fromkeys(networks)
    for name, network in networks.items() if evaluated else ():
        figures[name] = evaluate(runner, network, metric)
        metric = figures[name].metric  # the first network's, for all
    image = torch.zeros(1, channels_of(runner.model), *merged.size)
    calls = [functools.partial(network, image) for network in timed.values()]
    seconds = dict(zip(timed, interleaved_latency(calls)))
    return [
        QuantizationStage(name, figures[name], sizes[name], seconds[name])
        for name in networks
    ]


def _drop(stages: List[QuantizationStage]) -> Optional[float]:
    first, last = stages[0].figure, stages[-1].figure
    return None if first is None else fall(first, last)


def _noted(model: Any) -> dict:
    """The notes that mmdbb wrote into an ONNX model; empty if none."""
    props = {p.key: p.value for p in model.metadata_props}
    try:
        own = json.loads(props.get(METADATA, '{}'))
    except ValueError:  # another program's entry of the same name
        return {}
    return own if isinstance(own, dict) else {}


def _note(path: str, notes: dict) -> None:
    """Add notes to an INT8 file, and check that it reads back the same."""
    import onnx

    model = onnx.load(path)
    props = {p.key: p.value for p in model.metadata_props}
    props[METADATA] = json.dumps({**_noted(model), **notes})
    onnx.helper.set_model_props(model, props)
    onnx.save(model, path)
    if onnx.load(path) != model:
        raise UserError(
            f'{os.path.basename(path)} differs from the network that was '
            'written into it; nothing written'
        )
