# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""How a network is quantized after training, all of it or some layers."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

from mmengine.runner import Runner
from torch import Tensor

from mmdbb.errors import UserError
from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.outputs import Source
from mmdbb.mm.quantization.fake import quantizers
from mmdbb.mm.quantization.merged import Merged
from mmdbb.mm.quantization.onnx_layers import matching
from mmdbb.mm.quantization.onnx_static import Layers, layers_in, quantize_onnx


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
        keep_float: Patterns of the layers that stay in float, see
            :func:`mmdbb.mm.quantization.onnx_layers.matching`.
        budget: Largest fall of the evaluator's figure, in points
            (hundredths): as few more layers stay in float as meet it. If the
            figure's unit is not known, in per cent. None keeps no more.
        probes: Number of the calibration images that the sensitivity of
            layers is measured on.
    """

    calibration: Calibration = Calibration()
    method: str = 'minmax'
    per_channel: bool = True
    reduce_range: bool = False
    op_types: Optional[Sequence[str]] = None
    keep_float: Sequence[str] = ()
    budget: Optional[float] = None
    probes: int = 32


class PostTraining:
    """Quantizes a network's float file as options say, as often as asked.

    Args:
        source: The source that the file was made from.
        runner: The config's runner.
        merged: The float file.
        options: How to quantize.

    Attributes:
        path: Path of the float file.
        images: Normalised images (N, C, H, W) to calibrate with.
        kept: Names of the layers that ``keep_float`` leaves in float.
        names: Names of the other layers.

    Raises:
        UserError: If there are no images, a pattern matches no layer, or the
            network was trained for INT8.
    """

    def __init__(
        self,
        source: Source,
        runner: Runner,
        merged: Merged,
        options: QuantizeOptions,
    ) -> None:
        if merged.trained is not None and quantizers(merged.trained):
            raise UserError(
                f'{source.checkpoint} was trained for INT8, with all its '
                'layers; which layers stay in float can be chosen (or their '
                'sensitivity measured) when quantizing after training only'
            )
        names = layers_in(merged.path, options.op_types)
        self.path, self._options = merged.path, options
        self.kept = matching(names, options.keep_float)
        self.names = [name for name in names if name not in self.kept]
        self.images: Tensor = options.calibration.images(
            source.config, runner.model, merged.size
        )

    def write(self, out: str, kept: Sequence[str] = ()) -> Layers:
        """Write an INT8 file.

        Args:
            out: Path of the file.
            kept: Names of more layers that stay in float.

        Returns:
            Layers: Counts of the nodes in integers and in floating point.
        """
        options = self._options
        return quantize_onnx(
            self.path,
            out,
            self.images,
            options.method,
            options.per_channel,
            options.reduce_range,
            options.op_types,
            [*self.kept, *kept],
        )

    @property
    def probes(self) -> Tensor:
        """The images that sensitivities are measured on."""
        return self.images[: self._options.probes]
