# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Wrap networks of OpenMMLab's packages as functions from images to tensors.

Exporters want a module that takes a tensor and returns tensors. Here stand the
outputs that a classifier, a segmentor and a detector give for images. They are
recognised by the names of their base classes, so that no package of
OpenMMLab's needs to be imported.
"""

from __future__ import annotations

import inspect
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor, nn

from mmdbb.compare import relative_error
from mmdbb.errors import UserError
from mmdbb.mm.host_internals import channel_order
from mmdbb.modules import modules_that_run, named_values

#: Heads of a detector that read its feature maps besides the dense head.
FEATURE_READERS = ('roi_head', 'mask_head')


class ExportModule(nn.Module):
    """Base class, for any network that maps images to tensors.

    Args:
        network: The network, such as a backbone.
        head: Whether to run a detector's dense head too.

    Shape:
        - Input: normalised images (N, C, H, W)
        - Output: a tuple of tensors, named by :meth:`outputs`
    """

    #: Name of the network's output.
    output = 'output'
    #: Operators of our own in the network -> functions that write them in
    #: ONNX.
    translations: Dict[Any, Any] = {}

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
        """Run the network, and name its outputs.

        Args:
            images: Normalised images (N, C, H, W).

        Returns:
            dict: Names -> tensors, in the order of :meth:`forward`.
        """
        return named_tensors(self.output, self.run(images))

    def run(self, images: Tensor):
        """Run the network.

        Args:
            images: Normalised images (N, C, H, W).

        Returns:
            A tensor, or lists, tuples and dicts of tensors.
        """
        return self.network(images)

    def expected(self, images: Tensor) -> Dict[str, Tensor]:
        """Outputs that a file must give, computed as the package does.

        Args:
            images: Normalised images (N, C, H, W).
        """
        return self.outputs(images)

    def errors(
        self, found: Tuple[Tensor, ...], expected: Dict[str, Tensor]
    ) -> Dict[str, float]:
        """How far a file's outputs are from those expected.

        Args:
            found: Outputs of the file, in the order of :meth:`forward`.
            expected: What :meth:`expected` returned.

        Returns:
            dict: Name -> largest difference, as a share of the output's
            largest magnitude.
        """
        return {
            name: relative_error(value, expected[name])
            for name, value in zip(expected, found)
        }

    @torch.no_grad()
    def drop_unused(self, images: Tensor) -> None:
        """Remove the network's children that a run does not reach.

        Otherwise the file would hold the weights of auxiliary heads and of
        other parts that only training uses.

        Args:
            images: Normalised images (N, C, H, W) to run.
        """
        with modules_that_run(self.network) as ran:
            self(images)
        for name, child in self.network.named_children():
            if ran.isdisjoint(child.modules()):
                self.network._modules[name] = None


class Classifier(ExportModule):
    """mmpretrain's classifier: images to logits (without a head, features)."""

    @property
    def output(self) -> str:
        head = getattr(self.network, 'head', None)
        return 'feature' if head is None else 'logits'

    def run(self, images: Tensor):
        return self.network(images, mode='tensor')


class SelfSupervised(ExportModule):
    """mmpretrain's self-supervised networks: images to features."""

    output = 'feature'

    def run(self, images: Tensor):
        return self.network.extract_feat(images)


class Segmentor(ExportModule):
    """mmseg's segmentor: images to the logits of the (last) decode head.

    The logits are not resized: their height and width are usually an eighth
    or a quarter of the image's. A network that has no such output (PointRend,
    MaskFormer) is run by its ``encode_decode``, which gives logits of the
    image's size.
    """

    output = 'logits'

    def run(self, images: Tensor):
        try:
            return self.network(images, mode='tensor')
        except Exception:  # networks raise all kinds of errors
            size = tuple(images.shape[-2:])
            names = (
                'img_shape',
                'ori_shape',
                'pad_shape',
                'batch_input_shape',
            )
            meta = dict.fromkeys(names, size)
            return self.network.encode_decode(images, [meta] * len(images))


class Detector(ExportModule):
    """mmdet's detector: images to feature maps of the neck, level by level.

    Without a neck, the backbone's. With ``head`` it also gives the raw maps
    of the dense head (``bbox_head`` of a single-stage detector, else
    ``rpn_head``), with the names of the arguments of the head's loss:
    ``cls_scores_0``, ``bbox_preds_0``. The feature maps are then left out,
    unless another head reads them.
    """

    output = 'feature'

    def __init__(self, network: nn.Module, head: bool = False) -> None:
        super().__init__(network, head)
        self.with_features = not head or any(
            isinstance(getattr(network, name, None), nn.Module)
            for name in FEATURE_READERS
        )

    def _refuse_head(self, network: nn.Module) -> None:
        if self.dense_head(network) is None:
            raise UserError(
                f'{type(network).__name__} has no dense head to export: '
                'neither a bbox_head nor an rpn_head that maps feature maps '
                'to score maps'
            )

    @staticmethod
    def dense_head(network: nn.Module) -> nn.Module | None:
        for name in ('bbox_head', 'rpn_head'):
            head = getattr(network, name, None)
            # The head of a transformer reads queries, not feature maps.
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
        head = self.dense_head(self.network)
        maps = head(features)
        for name, levels in zip(_map_names(head, len(maps)), maps):
            named.update(named_tensors(name, levels))
        return named


#: Package and name of a base class -> the wrapper of its networks.
HOSTS = {
    ('mmpretrain', 'BaseClassifier'): Classifier,
    ('mmpretrain', 'BaseSelfSupervisor'): SelfSupervised,
    ('mmseg', 'BaseSegmentor'): Segmentor,
    ('mmdet', 'BaseDetector'): Detector,
}


def export_module(model: nn.Module, head: bool = False) -> ExportModule:
    """Wrap a network for export.

    Args:
        model: A classifier, segmentor or detector, or any module that maps
            images to tensors.
        head: Whether to export a detector's dense head too.

    Raises:
        UserError: If ``head`` is True, but the network has no dense head.
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
    """How images are preprocessed before they enter the network.

    Args:
        model: The network. Without a ``data_preprocessor`` all values are
            None.

    Returns:
        dict: ``mean`` and ``std`` of each channel, on the scale of 0 to 255,
        or None if images are not normalised; and ``channel_order``, in which
        the network takes the channels: ``'RGB'``, ``'BGR'``, or None if
        unknown.
    """
    own = getattr(model, 'data_preprocessor', None)
    return dict(
        mean=_numbers(getattr(own, 'mean', None)),
        std=_numbers(getattr(own, 'std', None)),
        channel_order=channel_order(own),
    )


def named_tensors(name: str, outputs: Any) -> Dict[str, Tensor]:
    """Flatten the outputs of a network, and give each tensor a name.

    Args:
        name: Start of the names, such as ``'feature'`` for ``feature_0``.
        outputs: The outputs: a tensor, or nested lists, tuples and dicts.

    Raises:
        UserError: If they hold something other than tensors.
    """
    named = dict(named_values(name, outputs, separator='_', unwrap=True))
    for value in named.values():
        if not isinstance(value, Tensor):
            raise UserError(
                f'the network returns a {type(value).__name__}, but an '
                'export needs tensors'
            )
    return named


def _map_names(head: nn.Module, count: int) -> List[str]:
    """Names for the maps that a head's forward returns.

    The head's loss takes these maps first, so its parameters name them.

    Args:
        head: The dense head.
        count: Number of the maps.
    """
    loss = getattr(head, 'loss_by_feat', None)
    names = list(inspect.signature(loss).parameters)[:count] if loss else []
    return names if len(names) == count else [f'map{i}' for i in range(count)]


def _numbers(values: Tensor | None) -> List[float] | None:
    return None if values is None else values.flatten().tolist()
