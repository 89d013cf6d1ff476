# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Networks of the host packages as functions from images to named tensors.

Exporters want a module that takes a tensor and returns tensors. What a
classifier, a segmentor and a detector give for images is said here, by the
names of their base classes: no host package is imported.
"""

from __future__ import annotations

import inspect
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.mm.host_internals import channel_order
from mmdbb.modules import named_values

#: Attributes of a detector that read its feature maps after a dense head.
FEATURE_READERS = ('roi_head', 'mask_head')


class ExportModule(nn.Module):
    """Base: any network that maps images to tensors, a backbone for one.

    Args:
        network: The network.
        head: Whether a detector's dense head runs too.

    Shape:
        - Input: normalised images (N, C, H, W)
        - Output: a tuple of tensors, named by :meth:`outputs`
    """

    #: Name of the network's output.
    output = 'output'

    def __init__(self, network: nn.Module, head: bool = False) -> None:
        super().__init__()
        if head:
            self._refuse_head(network)
        self.network = network
        self.head = head

    def _refuse_head(self, network: nn.Module) -> None:
        raise UserError(
            f'head=True is for detectors, not for {type(network).__name__}: '
            'other networks are exported with their heads'
        )

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return tuple(self.outputs(images).values())

    def outputs(self, images: Tensor) -> Dict[str, Tensor]:
        """All outputs by name, in the order of the exported ones."""
        return named_tensors(self.output, self.run(images))

    def run(self, images: Tensor):
        """What the network gives: tensors, perhaps nested."""
        return self.network(images)

    @torch.no_grad()
    def drop_unused(self, images: Tensor) -> None:
        """Remove the network's parts that these images do not run through.

        Auxiliary heads and what else is for training would be written into
        the file with their weights.
        """
        ran = set()
        hooks = [
            module.register_forward_pre_hook(lambda m, _: ran.add(m))
            for module in self.network.modules()
        ]
        try:
            self(images)
        finally:
            for hook in hooks:
                hook.remove()
        for name, child in self.network.named_children():
            if ran.isdisjoint(child.modules()):
                self.network._modules[name] = None


class Classifier(ExportModule):
    """mmpretrain's: images to logits; to features if it has no head."""

    @property
    def output(self) -> str:
        head = getattr(self.network, 'head', None)
        return 'feature' if head is None else 'logits'

    def run(self, images: Tensor):
        return self.network(images, mode='tensor')


class Segmentor(ExportModule):
    """mmseg's: images to the logits of the (last) decode head.

    Their size is the decode head's, usually an 8th or a 4th of the image's.
    """

    output = 'logits'

    def run(self, images: Tensor):
        return self.network(images, mode='tensor')


class Detector(ExportModule):
    """mmdet's: images to the maps of backbone and neck, level by level.

    With ``head`` also the raw maps of the dense head (``bbox_head`` of a
    single stage, else ``rpn_head``), named by what the head's loss calls
    them: ``cls_scores_0``, ``bbox_preds_0``. Features are then left out where
    nothing else reads them.
    """

    output = 'feature'

    def __init__(self, network: nn.Module, head: bool = False) -> None:
        super().__init__(network, head)
        self.with_features = not head or any(
            isinstance(getattr(network, name, None), nn.Module)
            for name in FEATURE_READERS
        )

    def _refuse_head(self, network: nn.Module) -> None:
        if self._dense_head(network) is None:
            raise UserError(
                f'{type(network).__name__} has no dense head to export: '
                'neither a bbox_head nor an rpn_head that maps feature maps '
                'to score maps'
            )

    @staticmethod
    def _dense_head(network: nn.Module) -> nn.Module | None:
        for name in ('bbox_head', 'rpn_head'):
            head = getattr(network, name, None)
            # A transformer's head reads queries, not maps.
            if isinstance(head, nn.Module) and not hasattr(
                network, 'forward_transformer'
            ):
                return head
        return None

    def outputs(self, images: Tensor) -> Dict[str, Tensor]:
        features = self.network.extract_feat(images)
        named = named_tensors(self.output, list(features))
        if not self.head:
            return named
        if not self.with_features:
            named = {}
        head = self._dense_head(self.network)
        maps = head(features)
        for name, levels in zip(_map_names(head, len(maps)), maps):
            named.update(named_tensors(name, levels))
        return named


#: Base class and the package it comes from -> how it is exported.
HOSTS = {
    ('mmpretrain', 'BaseClassifier'): Classifier,
    ('mmseg', 'BaseSegmentor'): Segmentor,
    ('mmdet', 'BaseDetector'): Detector,
}


def export_module(model: nn.Module, head: bool = False) -> ExportModule:
    """Wrap a network for export.

    Args:
        model: A classifier, segmentor or detector, or any module that maps
            images to tensors.
        head: Whether a detector's dense head runs too.

    Raises:
        UserError: If ``head`` is asked of what has no dense head.
    """
    for base in type(model).__mro__:
        package = base.__module__.partition('.')[0]
        if (package, base.__name__) in HOSTS:
            return HOSTS[package, base.__name__](model, head)
    return ExportModule(model, head)


def is_detector(model: nn.Module) -> bool:
    """Tell whether a network is a detector, so that its head is optional.

    ``export_module(model, head=is_detector(model))`` runs the whole network,
    whichever kind it is.

    Args:
        model: Any network.
    """
    return isinstance(export_module(model), Detector)


def preprocessing(model: nn.Module) -> dict:
    """What has to be done to images before they enter the network.

    Args:
        model: Its ``data_preprocessor``, if it has one, is read.

    Returns:
        dict: ``mean`` and ``std`` a channel, on the scale of 0 to 255, None
        if images are not normalised; ``channel_order``, ``'RGB'`` or
        ``'BGR'``, or None if unknown. Images are read as BGR in the mm
        family.
    """
    own = getattr(model, 'data_preprocessor', None)
    return dict(
        mean=_numbers(getattr(own, 'mean', None)),
        std=_numbers(getattr(own, 'std', None)),
        channel_order=channel_order(own),
    )


def named_tensors(name: str, outputs: Any) -> Dict[str, Tensor]:
    """All tensors that a network returns, each with a flat name.

    Args:
        name: Name of the whole.
        outputs: What the network returned.

    Raises:
        UserError: If it returned something else than tensors.
    """
    named = dict(named_values(name, outputs, separator='_', unwrap=True))
    for value in named.values():
        if not isinstance(value, Tensor):
            raise UserError(
                f'the network returns a {type(value).__name__}, where an '
                'export needs tensors'
            )
    return named


def _map_names(head: nn.Module, count: int) -> List[str]:
    """The head's own names for the maps that its forward returns."""
    loss = getattr(head, 'loss_by_feat', None)
    names = list(inspect.signature(loss).parameters)[:count] if loss else []
    return names if len(names) == count else [f'map{i}' for i in range(count)]


def _numbers(values: Tensor | None) -> List[float] | None:
    return None if values is None else values.flatten().tolist()
