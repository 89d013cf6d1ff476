# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run ONNX files in ONNX Runtime, also in place of a host's own network.

There the file replaces the network's computation only. The host still does
everything around it: the data pipeline, the decoding of boxes, the resizing of
logits, the evaluation (:mod:`mmdbb.mm.evaluation.substitutes`).
"""

from __future__ import annotations

from typing import List

import torch
from torch import Tensor

from mmdbb.errors import UserError
from mmdbb.mm.evaluation.images import pad_to


class OnnxNetwork:
    """A network in an ONNX file, run by ONNX Runtime on the CPU.

    Args:
        path: Path of the file.
        threads: Number of threads; by default as many as torch uses.
        optimize: Whether the runtime may fuse nodes. If not, it runs QDQ
            files in floating point, node by node, and so only simulates INT8.

    Attributes:
        path: Path of the file.
        size: Height and width in pixels of the images that the file takes.
        names: Names of the outputs.

    Raises:
        UserError: If ONNX Runtime cannot run the file, or its only input is
            not a batch of images of a fixed size.
    """

    def __init__(
        self, path: str, threads: int = 0, optimize: bool = True
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        if not optimize:
            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=['CPUExecutionProvider']
            )
        except Exception as error:  # ONNX Runtime has errors of its own
            reason = str(error).splitlines()[0]
            raise UserError(
                f'ONNX Runtime cannot run {path}: {reason}'
            ) from error
        inputs = {i.name: i.shape for i in self._session.get_inputs()}
        self._input, shape = next(iter(inputs.items()), ('', []))
        sizes = [isinstance(n, int) for n in shape]
        if len(inputs) != 1 or sizes[1:] != [True] * 3:
            raise UserError(
                f'{path} must take images of shape (N, C, H, W), with C, H '
                f'and W fixed, and nothing else; it takes: {inputs}'
            )
        self.path = path
        self.size = tuple(shape[2:])
        self.names = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: Tensor) -> List[Tensor]:
        """Run on normalised images (N, C, H, W), padded to ``size``."""
        images = pad_to(images.float().cpu(), self.size).contiguous()
        outputs = self._session.run(None, {self._input: images.numpy()})
        return [torch.from_numpy(output) for output in outputs]
