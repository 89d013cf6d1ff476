# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to an INT8 file whose accuracy is known."""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor

from mmdbb.errors import UserError, require_packages
from mmdbb.files.checkpoints import all_or_nothing, check_regular
from mmdbb.mm.deploy.checkpoint import refuse_inputs
from mmdbb.mm.engine.measure import interleaved_latency
from mmdbb.mm.evaluation.figures import Figure, evaluate, quiet_runner
from mmdbb.mm.evaluation.images import calibration_images
from mmdbb.mm.export.formats import METADATA
from mmdbb.mm.export.modules import Detector, export_module
from mmdbb.mm.export.network import export_network
from mmdbb.mm.quantization.fake import (
    WeightQuantizer,
    quantizers,
    remove_quantizers_,
)
from mmdbb.mm.quantization.network import load_network
from mmdbb.mm.quantization.onnx_static import (
    PACKAGES,
    Layers,
    check_float,
    check_weights,
    quantize_onnx,
)
from mmdbb.mm.quantization.qdq import write_qdq
from mmdbb.mm.quantization.session import OnnxNetwork
from mmdbb.version import __version__


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


class Options(NamedTuple):
    """How a network is quantized after training, see :func:`quantize_onnx`.

    Attributes:
        count: Images to calibrate with.
        split: Whose dataloader they come from: ``train``, ``val``, ``test``.
        method: ``minmax``, ``entropy`` or ``percentile``.
        per_channel: Whether weights have a scale a channel.
        reduce_range: Whether weights use seven bits.
        op_types: Operators to quantize, by default all.
    """

    count: int = 128
    split: str = 'train'
    method: str = 'minmax'
    per_channel: bool = True
    reduce_range: bool = False
    op_types: Optional[Sequence[str]] = None


def quantize_checkpoint(
    cfg: Config,
    checkpoint: str,
    out: str,
    options: Optional[Options] = None,
    image_size: Optional[Tuple[int, int]] = None,
    metric: Optional[str] = None,
    max_drop: Optional[float] = 1.0,
    evaluated: bool = True,
    overwrite: bool = False,
    seed: int = 0,
) -> Quantized:
    """Merge, export, quantize, evaluate; write the file if it is as good.

    Args:
        cfg: Config of the checkpoint, with data sets and evaluator.
        checkpoint: Path of a trained checkpoint, with blocks or merged, or
            after quantization-aware training: then the ranges are those that
            were trained. Or of an ONNX file of the network in float32.
        out: Path of the INT8 file, ``*.onnx``.
        options: How to quantize, by default as :class:`Options` says.
        image_size: Height and width in pixels that the file takes; by default
            that of the first image of the test set.
        metric: The evaluator's figure to compare, by default its main one.
        max_drop: Largest fall of the figure, in hundredths, from the first
            network to the INT8 one; None for any.
        evaluated: Whether to run the evaluator at all.
        overwrite: Whether ``out`` may be replaced.
        seed: Of the choice of images.

    Returns:
        Quantized: The file and how good it is.

    Raises:
        UserError: If an input is wrong, the network cannot be quantized, or
            the figure falls by more than ``max_drop``. Nothing is written.
    """
    require_packages('quantization', 'quantization', *PACKAGES)
    options = options or Options()
    if not out.endswith('.onnx'):
        raise UserError(f'the output must end in .onnx, got {out}')
    refuse_inputs([out], cfg, checkpoint)
    with all_or_nothing(out, overwrite=overwrite) as (draft,):
        folder = Path(draft).parent
        with quiet_runner(cfg) as runner:
            work = _Work(cfg, runner, checkpoint, folder, image_size, seed)
            layers, count = work.quantize(draft, options)
            stages = work.stages(draft, metric, evaluated)
        drop = _drop(stages)
        if drop is not None and max_drop is not None and not drop <= max_drop:
            first, last = stages[0].figure, stages[-1].figure
            raise UserError(
                f'{last.name} falls by {drop:.2f} points, from '
                f'{first.points:.2f} to {last.points:.2f}, more than '
                f'--max-drop {max_drop:g}; nothing written'
            )
        _note(draft, options, count, stages, work.trained_per_channel())
    return Quantized(out, stages, layers, count, work.size, drop)


class _Work:
    """The steps from a checkpoint to the INT8 file, in a scratch folder."""

    def __init__(
        self,
        cfg: Config,
        runner: Runner,
        checkpoint: str,
        folder: Path,
        size: Optional[Tuple[int, int]],
        seed: int,
    ) -> None:
        self.cfg, self.runner, self.seed = cfg, runner, seed
        self.merged = str(folder / 'merged.onnx')
        if checkpoint.endswith('.onnx'):
            self._take_file(checkpoint)
            self.trained = None
            self.size = OnnxNetwork(self.merged).size
            if size not in (None, self.size):
                raise UserError(
                    f'{checkpoint} takes images of {self.size} pixels, got '
                    f'--image-size {size}'
                )
            return
        self.trained = runner.model = load_network(runner.model, checkpoint)
        self.size = size or self._images(1, 'test').shape[-2:]
        network = copy.deepcopy(self.trained)
        remove_quantizers_(network)
        export_network(
            network,
            self.merged,
            image_size=self.size,
            head=isinstance(export_module(network), Detector),
        )

    def _take_file(self, path: str) -> None:
        import onnx

        if not os.path.exists(path):
            raise UserError(f'no such ONNX file: {path}')
        check_regular(path, 'ONNX file')
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # of protobuf's own kinds
            raise UserError(f'{path} is not an ONNX file') from error
        check_float(model, path)
        check_weights(model, path)
        onnx.save(model, self.merged)

    def trained_per_channel(self) -> Optional[bool]:
        """Whether weights were trained with a scale a channel, if so."""
        found = quantizers(self.trained) if self.trained is not None else ()
        weights = [q for q in found if isinstance(q, WeightQuantizer)]
        return weights[0].per_channel if weights else None

    def _images(self, count: int, split: str) -> Tensor:
        size = getattr(self, 'size', None)
        return calibration_images(
            self.cfg, self.runner.model, count, split, size, self.seed
        )

    def quantize(self, draft: str, options: Options) -> Tuple[Layers, int]:
        """Write the INT8 file; say how many images that took."""
        if self.trained is not None and quantizers(self.trained):
            return write_qdq(self.merged, draft, self.trained), 0
        images = self._images(options.count, options.split)
        layers = quantize_onnx(
            self.merged,
            draft,
            images,
            options.method,
            options.per_channel,
            options.reduce_range,
            options.op_types,
        )
        return layers, len(images)

    def stages(
        self, draft: str, metric: Optional[str], evaluated: bool
    ) -> List[Stage]:
        """Evaluate and measure what there is, the INT8 file last."""
        networks = dict(
            merged=OnnxNetwork(self.merged), int8=OnnxNetwork(draft)
        )
        sizes = dict(
            merged=os.path.getsize(self.merged), int8=os.path.getsize(draft)
        )
        if self.trained is not None:
            networks = dict(trained=None, **networks)
            tensors = self.trained.state_dict().values()
            sizes['trained'] = sum(
                t.numel() * t.element_size() for t in tensors
            )
        figures = {
            name: evaluate(self.runner, network, metric) if evaluated else None
            for name, network in networks.items()
        }
        seconds = self._seconds(networks)
        return [
            Stage(name, figures[name], sizes[name], seconds[name])
            for name in networks
        ]

    def _seconds(
        self, networks: Dict[str, Optional[OnnxNetwork]]
    ) -> Dict[str, float]:
        image = torch.zeros(1, 3, *self.size)
        calls: List[Callable] = []
        for network in networks.values():
            if network is None:
                call, x = self._trained_call(), image.to(self._device())
            else:
                call, x = OnnxNetwork(network.path, threads=1), image
            calls.append(functools.partial(call, x))
        return dict(zip(networks, interleaved_latency(calls)))

    def _trained_call(self) -> Callable:
        head = isinstance(export_module(self.trained), Detector)
        return export_module(self.trained.eval(), head)

    def _device(self) -> torch.device:
        return next(self.trained.parameters()).device


def _drop(stages: List[Stage]) -> Optional[float]:
    first, last = stages[0].figure, stages[-1].figure
    return None if first is None else first.points - last.points


def _note(
    draft: str,
    options: Options,
    count: int,
    stages: List[Stage],
    trained_per_channel: Optional[bool],
) -> None:
    """Write into the file what is known of it."""
    import onnx

    model = onnx.load(draft)
    props = {p.key: p.value for p in model.metadata_props}
    own = json.loads(props.get(METADATA, '{}'))
    own['version'] = __version__
    own['quantization'] = dict(
        method=options.method if count else 'trained',
        images=count,
        per_channel=(
            options.per_channel
            if trained_per_channel is None
            else trained_per_channel
        ),
        points={s.name: s.figure.points for s in stages if s.figure},
    )
    props[METADATA] = json.dumps(own)
    onnx.helper.set_model_props(model, props)
    onnx.save(model, draft)
