# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""ONNX files run in ONNX Runtime, also in the place of a host's network.

The host keeps everything around its network: the data pipeline, the decoding
of boxes, the resizing of logits, the evaluator. Only what the network itself
computes comes from the file.
"""

from __future__ import annotations

import contextlib
from typing import Callable, Iterator, List, Tuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmdbb.checkpoint.export_modules import Detector, export_module
from mmdbb.errors import UserError
from mmdbb.quantization.calibration import pad_to


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


@contextlib.contextmanager
def running_instead(
    model: nn.Module, network: Callable[[Tensor], List[Tensor]]
) -> Iterator[None]:
    """Within the context a host's model predicts by another network.

    Args:
        model: A classifier, segmentor or detector with a dense head, in eval
            mode.
        network: From images (N, C, H, W) to the tensors that
            :func:`mmdbb.checkpoint.export.export_network` names, in their
            order. Its ``size`` is height and width that it takes.

    Raises:
        UserError: If there is no head that turns tensors into predictions.
    """
    heads = _heads(model)
    features, maps = _structures(model, heads[-1], network.size)
    kept = {}

    def extract_feat(inputs: Tensor, *args, **kwargs):
        if isinstance(export_module(model), Detector):
            pad = [network.size[i] - inputs.shape[2 + i] for i in (0, 1)]
            fits = min(pad) >= 0
        else:
            fits = tuple(inputs.shape[2:]) == network.size
        if not fits:
            raise UserError(
                f'an image of {tuple(inputs.shape[2:])} pixels is evaluated '
                f'by a network of {network.size}; choose another --image-size'
            )
        outputs = [y.to(inputs.device) for y in network(inputs)]
        count = len(outputs) - maps.num_leaves
        kept['maps'] = tree_unflatten(outputs[count:], maps)
        if count:
            return tree_unflatten(outputs[:count], features)
        return (inputs,)

    def forward(*args, **kwargs):
        return kept['maps']

    places = [(model, 'extract_feat', extract_feat)]
    places += [(head, 'forward', forward) for head in heads]
    for place, name, function in places:
        setattr(place, name, function)
    try:
        yield
    finally:
        for place, name, _ in places:
            delattr(place, name)


def _heads(model: nn.Module) -> List[nn.Module]:
    kind = export_module(model)
    if isinstance(kind, Detector):
        head = kind._dense_head(model)
    else:
        head = getattr(model, 'head', None) or getattr(
            model, 'decode_head', None
        )
    if not isinstance(head, nn.Module):
        raise UserError(
            f'{type(model).__name__} has no head whose predictions could be '
            'evaluated: quantization is for classifiers, segmentors and '
            'detectors with a dense head'
        )
    return list(head) if isinstance(head, nn.ModuleList) else [head]


@torch.no_grad()
def _structures(model: nn.Module, head: nn.Module, size: Tuple[int, int]):
    """How features and the head's outputs are nested."""
    found = []
    forward = head.forward

    def watch(*args, **kwargs):  # a hook would miss calls of forward itself
        found.append(forward(*args, **kwargs))
        return found[-1]

    parameter = next(model.parameters())
    channels = next(
        m.in_channels for m in model.modules() if hasattr(m, 'in_channels')
    )
    images = parameter.new_zeros(1, channels, *size)
    features = list(model.extract_feat(images))
    head.forward = watch
    try:
        if isinstance(export_module(model), Detector):
            head(tuple(features))
        else:
            model(images, mode='tensor')
    finally:
        del head.forward
    return tree_flatten(features)[1], tree_flatten(found[-1])[1]
