# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run any network on images, and say which of its parts could not be run.

The parts of OpenMMLab's networks are known by their attributes: a method
``extract_feat`` that gives features, and heads that read them. A head that
needs more than features, such as queries or proposals, is reached by running
the whole network in the package's own ways.
"""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.modules import (
    modules_that_run,
    named_values,
    sync_norms_in_any_precision,
)
from mmdbb.ports import PORTS
from mmdbb.reparam import find_blocks

#: Attributes under which OpenMMLab's networks keep heads that read features.
DENSE_HEADS = (
    'head',
    'decode_head',
    'auxiliary_head',
    'bbox_head',
    'rpn_head',
    'mask_head',
)
#: Name of the outputs of a network that ran as a whole.
WHOLE = 'network'
#: Parts that a network without ``extract_feat`` is run by.
_BEFORE_HEADS = ('backbone', 'neck')
_MISSED = 'it reads more than features'


class CannotRun(UserError):
    """Not even a network's features can be computed on the images."""


class Outputs(NamedTuple):
    """What a network gave, and what could not be run.

    Attributes:
        tensors: Name -> tensor.
        left_out: Name of a part that could not be run -> the reason.
    """

    tensors: Dict[str, Tensor]
    left_out: Dict[str, str]


def run_network(
    model: nn.Module, images: Tensor, once: bool = False
) -> Outputs:
    """Run a network and collect features and outputs of all dense heads.

    Each run draws the same random numbers, and the caller's random state
    stays as it is.

    Args:
        model: A classifier, detector, segmentor or tracker in eval mode, or
            any module that maps images to tensors.
        images: Normalised images of shape (N, C, H, W).
        once: Whether to run each part at most once: a head that cannot be run
            on features is left out, and a network without features refused.

    Raises:
        CannotRun: If not even the features can be computed.
    """
    seeded = torch.random.fork_rng(devices=[])
    precise = sync_norms_in_any_precision(model)
    with seeded, precise, modules_that_run(model) as reached:
        torch.manual_seed(0)
        if hasattr(model, 'extract_feat'):
            try:
                features = _features(model, images)
            except Exception as error:  # networks raise all kinds of errors
                return _parts(model, images, error, once)
            return _heads(model, images, features, None if once else reached)
        try:
            return Outputs(_tensors('output', model(images)), {})
        except Exception as error:
            return _parts(model, images, error, once)


def _features(model: Any, images: Tensor) -> Any:
    try:
        return model.extract_feat(images)
    except Exception:
        if images.dim() != 5:
            raise
        # A recogniser of videos takes several views of each.
        return model.extract_feat(images[:, None])


def is_of_head(name: str) -> bool:
    """Whether an output of :func:`run_network` is a head's, by its name."""
    known = (*DENSE_HEADS, WHOLE)
    return any(part in known for part in name.split('.')[:2])


def reason_of(error: Exception) -> str:
    """An error's type and the start of its message."""
    line = (str(error).strip().splitlines() or [''])[0]
    message = line if len(line) <= 160 else f'{line[:157]}...'
    return f'{type(error).__name__}: {message}'.rstrip(': ')


def takes_other_images(model: nn.Module, images: Tensor) -> bool:
    """Whether a network runs as a whole on images of another size.

    Args:
        model: A network that cannot be run as a whole on ``images``.
        images: Images of shape (N, C, H, W).
    """
    for size in (224, 64, 512):
        shape = [2, *images.shape[1:]]
        shape[-min(2, images.dim() - 2) :] = [size] * min(2, images.dim() - 2)
        other = images.new_zeros(shape)
        with contextlib.suppress(CannotRun):
            if WHOLE not in run_network(model, other).left_out:
                return True
    return False


def _heads(
    model: nn.Module,
    images: Tensor,
    features: Any,
    reached: Optional[Set[nn.Module]],
) -> Outputs:
    tensors, left_out = _tensors('features', features), {}
    heads = dict(_named_heads(model))
    for label, head in heads.items():
        try:
            tensors.update(_tensors(label, head(features)))
        except Exception as error:
            left_out[label] = reason_of(error)
    if reached is None:
        return Outputs(tensors, left_out)
    for name, child in model.named_children():
        known = any(label.split('.')[0] == name for label in left_out)
        if not known and _is_missed(child, reached):
            heads[name], left_out[name] = child, _MISSED
    # Two-stage detectors sort what their RoI heads read.
    if left_out.keys() - {'roi_head'}:
        whole, reached, reason = _run_whole(model, images)
        missed = {
            label: f'{own}{reason}'
            for label, own in left_out.items()
            if reached.isdisjoint(heads[label].modules())
        }
        if len(missed) < len(left_out):
            tensors.update(whole)
        left_out = missed
    for label in left_out.keys() - dict(_named_heads(model)).keys():
        # Where no block is, layers are copies.
        if not find_blocks(heads[label]):
            del left_out[label]
    return Outputs(tensors, left_out)


def _is_missed(part: nn.Module, reached: Set[nn.Module]) -> bool:
    """Whether a run did not reach a part that computes with parameters."""
    has_parameters = next(part.parameters(), None) is not None
    return has_parameters and reached.isdisjoint(part.modules())


def _named_heads(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    for name in DENSE_HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.ModuleList):
            for i, each in enumerate(head):
                yield (f'{name}.{i}' if len(head) > 1 else name), each
        elif isinstance(head, nn.Module):
            yield name, head


def _run_whole(
    model: nn.Module, images: Tensor
) -> Tuple[Dict[str, Tensor], Set[nn.Module], str]:
    """Run a network in the first of the packages' ways that works.

    Returns:
        tuple: The outputs by name, and the modules that ran, both empty if no
        way works; and the reason why the last way does not.
    """
    ways = [_in_tensor_mode]
    if hasattr(model, 'encode_decode'):
        ways.append(_encode_decode)
    reason = ''
    for way in ways:
        with modules_that_run(model) as reached:
            try:
                tensors = _tensors(WHOLE, way(model, images))
            except Exception as error:
                reason = f'; as a whole: {reason_of(error)}'
                continue
        if tensors:
            return tensors, reached, ''
    return {}, set(), reason


def _in_tensor_mode(model: nn.Module, images: Tensor) -> Any:
    return model(images, PORTS.data_samples(images), mode='tensor')


def _encode_decode(model: Any, images: Tensor) -> Any:
    """Run one of mmseg's networks whose heads read each other's outputs."""
    samples: Any = PORTS.data_samples(images)
    return model.encode_decode(images, [each.metainfo for each in samples])


def _parts(
    model: nn.Module, images: Tensor, error: Exception, once: bool
) -> Outputs:
    """Run the parts of a network that cannot be run as a whole.

    A tracker holds a detector; a recogniser of videos has a backbone that
    takes images.
    """
    tensors, left_out = {}, {WHOLE: reason_of(error)}
    for name, part in () if once else model.named_children():
        if not hasattr(part, 'extract_feat'):
            if name not in _BEFORE_HEADS and find_blocks(part):
                left_out[name] = _MISSED
            continue
        try:
            found = run_network(part, images)
        except CannotRun:
            continue
        tensors.update({f'{name}.{n}': y for n, y in found.tensors.items()})
        left_out.update({f'{name}.{n}': y for n, y in found.left_out.items()})
    if not tensors and not once:
        tensors = _backbone_and_neck(model, images)
    if not tensors:
        raise CannotRun(
            f'the network cannot be run on images of shape '
            f'{tuple(images.shape)}: {reason_of(error)}'
        ) from error
    return Outputs(tensors, left_out)


def _backbone_and_neck(model: nn.Module, images: Tensor) -> Dict[str, Tensor]:
    found, features = {}, images
    for name in _BEFORE_HEADS:
        part = getattr(model, name, None)
        if not isinstance(part, nn.Module):
            break
        try:
            features = part(features)
        except Exception:
            break
        found.update(_tensors(name, features))
    return found


def _tensors(name: str, outputs: Any) -> Dict[str, Tensor]:
    return {
        full: value
        for full, value in named_values(name, outputs)
        if isinstance(value, Tensor) and value.is_floating_point()
    }
