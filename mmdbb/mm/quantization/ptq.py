# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Turn a trained checkpoint into an INT8 file, and measure its accuracy."""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import (
    Dict,
    List,
    NamedTuple,
    Optional,
    Tuple,
)

import torch
from mmengine.runner import Runner

from mmdbb.errors import UserError, require_packages
from mmdbb.mm.data_flow import channels_of
from mmdbb.mm.engine.measure import interleaved_latency
from mmdbb.mm.evaluation.figures import evaluate, quiet_runner
from mmdbb.mm.evaluation.metric import Figure, Metric, describe_fall, fall
from mmdbb.mm.evaluation.substitutes import TorchNetwork
from mmdbb.mm.export.formats import METADATA
from mmdbb.mm.outputs import Source, writing
from mmdbb.mm.quantization.fake import quantizers, remove_quantizers_
from mmdbb.mm.quantization.merged import Merged, merged_network, noted
from mmdbb.mm.quantization.onnx_static import PACKAGES, Layers
from mmdbb.mm.quantization.partial import Trial, fewest_in_float
from mmdbb.mm.quantization.post_training import PostTraining, QuantizeOptions
from mmdbb.mm.quantization.qdq import write_qdq
from mmdbb.mm.quantization.quantizers import WeightQuantizer
from mmdbb.mm.quantization.sensitivity import layer_errors
from mmdbb.mm.quantization.session import OnnxNetwork


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
        kept: Names of the layers that were left in float on purpose.
        trials: Networks that were tried to meet a budget, the one written
            last; empty without a budget.
    """

    path: str
    stages: List[QuantizationStage]
    layers: Layers
    images: int
    image_size: Tuple[int, int]
    drop: Optional[float]
    kept: List[str]
    trials: List[Trial]


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
            takes; by default the smallest that all images of the test set
            fit into.
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
            the figure falls by more than ``max_drop`` (or than the budget in
            ``options``, even with all layers in float). Nothing is written
            then.
    """
    require_packages('quantization', 'quantization', *PACKAGES)
    options, out = options or QuantizeOptions(), os.fspath(out)
    metric = metric or Metric()
    metric.check()
    _check_budget(options.budget, max_drop, evaluated)
    if not out.endswith('.onnx'):
        raise UserError(f'the output must end in .onnx, got {out}')
    with writing(source, out, overwrite=overwrite) as drafts:
        (draft,) = drafts.paths
        path = str(Path(draft).parent / 'merged.onnx')
        with quiet_runner(source.config) as runner:
            seed = options.calibration.seed
            merged = merged_network(source, runner, path, image_size, seed)
            integers = _quantized(
                source, runner, merged, draft, options, metric
            )
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
                kept_float=integers.kept,
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
        kept=integers.kept,
        trials=integers.trials,
    )


def _check_budget(
    budget: Optional[float], max_drop: Optional[float], evaluated: bool
) -> None:
    if budget is None:
        return
    if not evaluated:
        raise UserError('--budget needs the evaluation: omit --no-test')
    if max_drop is not None and budget > max_drop:
        raise UserError(
            f'--budget {budget:g} allows more than --max-drop {max_drop:g}'
        )


class _Integers(NamedTuple):
    """How the INT8 file was made.

    Attributes:
        layers: Counts of the nodes in integers and in floating point.
        method: How the ranges of activations were chosen; ``trained`` if
            training learned them.
        images: Number of calibration images; 0 if the ranges were trained.
        per_channel: Whether each output channel of a weight has a scale of
            its own.
        kept: Names of the layers that were left in float on purpose.
        trials: Networks that were tried to meet a budget.
    """

    layers: Layers
    method: str
    images: int
    per_channel: bool
    kept: List[str] = []
    trials: List[Trial] = []


def _quantized(
    source: Source,
    runner: Runner,
    merged: Merged,
    draft: str,
    options: QuantizeOptions,
    metric: Metric,
) -> _Integers:
    """Write the INT8 file, with trained ranges if there are any."""
    found = [] if merged.trained is None else list(quantizers(merged.trained))
    if found and not options.keep_float and options.budget is None:
        weights = [q for q in found if isinstance(q, WeightQuantizer)]
        return _Integers(
            layers=write_qdq(merged.path, draft, merged.trained),
            method='trained',
            images=0,
            per_channel=weights[0].per_channel,
        )
    quantizer = PostTraining(source, runner, merged, options)
    trials = []
    if options.budget is not None:
        trials = _trials(runner, merged, draft, metric, quantizer, options)
    kept = trials[-1].kept if trials else []
    return _Integers(
        layers=quantizer.write(draft, kept),
        method=options.method,
        images=len(quantizer.images),
        per_channel=options.per_channel,
        kept=[*quantizer.kept, *kept],
        trials=trials,
    )


def _trials(
    runner: Runner,
    merged: Merged,
    draft: str,
    metric: Metric,
    quantizer: PostTraining,
    options: QuantizeOptions,
) -> List[Trial]:
    """Try which layers must stay in float to meet the budget."""
    network = OnnxNetwork(merged.path)
    if merged.trained is not None:
        network = TorchNetwork(merged.trained, merged.size)
    first = evaluate(runner, network, metric)
    figures = []

    def trial(kept: List[str]) -> float:
        quantizer.write(draft, kept)
        found = evaluate(runner, OnnxNetwork(draft), first.metric)
        figures.append(found)
        return fall(first, found)

    def order() -> List[str]:
        return [layer.name for layer in layer_errors(quantizer)]

    trials = fewest_in_float(order, trial, options.budget)
    if not trials[-1].drop <= options.budget:
        raise UserError(
            f'even with all layers in float, '
            f'{describe_fall(first, figures[-1])}, more than --budget '
            f'{options.budget:g}; nothing written'
        )
    return trials


def _stages(
    runner: Runner,
    merged: Merged,
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


def _note(path: str, notes: dict) -> None:
    """Add notes to an INT8 file, and check that it reads back the same."""
    import onnx

    model = onnx.load(path)
    props = {p.key: p.value for p in model.metadata_props}
    props[METADATA] = json.dumps({**noted(model), **notes})
    onnx.helper.set_model_props(model, props)
    onnx.save(model, path)
    if onnx.load(path) != model:
        raise UserError(
            f'{os.path.basename(path)} differs from the network that was '
            'written into it; nothing written'
        )
