# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Let an OpenMMLab model predict with another network's outputs.

Everything around the network stays the OpenMMLab package's own: the data
pipeline, the decoding of boxes, the resizing of logits, the evaluator.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Callable, Iterator, List, Tuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmdbb.errors import UserError
from mmdbb.mm.data_flow import channels_of
from mmdbb.mm.evaluation.images import pad_to
from mmdbb.mm.export.modules import export_module, is_detector
from mmdbb.mm.host_internals import replaced


class TorchNetwork:
    """A network in PyTorch that takes images of one size, as a file does.

    Args:
        model: A classifier, segmentor or detector with a dense head. It is
            copied, so that the copy may stand in for the model itself.
        size: Height and width in pixels of the images that it takes.

    Attributes:
        size: Height and width in pixels.
    """

    def __init__(self, model: nn.Module, size: Tuple[int, int]) -> None:
        self.size = size
        network = copy.deepcopy(model)
        self._run = export_module(network, head=is_detector(network)).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> List[Tensor]:
        """Run on normalised images (N, C, H, W), padded to ``size``."""
        device = next(self._run.parameters()).device
        return list(self._run(pad_to(images, self.size).to(device)))


@contextlib.contextmanager
def running_instead(
    model: nn.Module, network: Callable[[Tensor], List[Tensor]]
) -> Iterator[None]:
    """Within the context a model predicts with another network's outputs.

    Args:
        model: A classifier, segmentor or detector with a dense head, in eval
            mode.
        network: A function that maps images (N, C, H, W) to a list of
            tensors: those that
            :func:`mmdbb.mm.export.network.export_network` names, in the same
            order. Its attribute ``size`` is the height and width in pixels
            that it takes.

    Raises:
        UserError: If the model has no head that turns tensors into
            predictions, or an image is not of the network's size.
    """
    heads = _heads(model)
    features, maps = _structures(model, heads[-1], network.size)
    kept = {}

    def extract_feat(inputs: Tensor, *args, **kwargs):
        if is_detector(model):
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
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(replaced(*place))
        yield


def _heads(model: nn.Module) -> List[nn.Module]:
    if is_detector(model):
        head = export_module(model).dense_head(model)
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
    """Find how the features and the head's outputs are nested.

    Args:
        model: The model.
        head: Its head.
        size: Height and width in pixels of the image to run the model on.
    """
    found = []
    forward = head.forward

    def watch(*args, **kwargs):  # a hook would miss calls of forward itself
        found.append(forward(*args, **kwargs))
        return found[-1]

    parameter = next(model.parameters())
    images = parameter.new_zeros(1, channels_of(model), *size)
    features = list(model.extract_feat(images))
    with replaced(head, 'forward', watch):
        if is_detector(model):
            head(tuple(features))
        else:
            model(images, mode='tensor')
    return tree_flatten(features)[1], tree_flatten(found[-1])[1]
