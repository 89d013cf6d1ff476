# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""ONNX files run in ONNX Runtime, also in the place of a host's network.

The host keeps everything around its network: the data pipeline, the decoding
of boxes, the resizing of logits, the evaluator. Only what the network itself
computes comes from the file.
"""

from __future__ import annotations

from typing import List

import torch
from torch import Tensor

from mmdbb.errors import UserError
from mmdbb.mm.evaluation.images import pad_to


class OnnxNetwork:
    """A file in ONNX Runtime, on the CPU.

    Args:
        path: The file.
        threads: Of the runtime; those of torch by default.
        optimize: Whether the runtime may fuse nodes: without it, QDQ files
            are computed literally, in floating point.

    Attributes:
        path: The file.
        size: Height and width in pixels that it takes.
        names: Of the outputs.

    Raises:
        UserError: If ONNX Runtime cannot run the file, or it takes something
            else than images of one size.
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
        except Exception as error:  # of ONNX Runtime's own kinds
            reason = str(error).splitlines()[0]
            raise UserError(
                f'ONNX Runtime cannot run {path}: {reason}'
            ) from error
        inputs = {i.name: i.shape for i in self._session.get_inputs()}
        self._input, shape = next(iter(inputs.items()), ('', []))
        sizes = [isinstance(n, int) for n in shape]
        if len(inputs) != 1 or sizes[1:] != [True] * 3:
            raise UserError(
                f'{path} must take images of shape (N, C, H, W), all but N '
                f'known, and nothing else; it takes: {inputs}'
            )
        self.path = path
        self.size = tuple(shape[2:])
        self.names = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: Tensor) -> List[Tensor]:
        """Outputs for normalised images (N, C, H, W), smaller ones padded."""
        images = pad_to(images.float().cpu(), self.size).contiguous()
        outputs = self._session.run(None, {self._input: images.numpy()})
        return [torch.from_numpy(output) for output in outputs]
