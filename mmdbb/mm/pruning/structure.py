# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Remove filters from a merged network, and count what the rest costs.

No config can state how many filters each layer of a pruned network has left.
So the tools write the stock network's config and the pruned weights, and
``mmdbb.load_deployed`` takes the sizes of the layers from the weights' shapes.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmdbb.errors import UserError, require_packages
from mmdbb.mm.data_flow import channels_of
from mmdbb.mm.export.modules import (
    FEATURE_READERS,
    export_module,
    is_detector,
)
from mmdbb.modules import count_parameters, in_eval_mode
from mmdbb.own_forward import is_plain, own_forwards
from mmdbb.reparam import find_blocks
from mmdbb.running import DENSE_HEADS


def require_torch_pruning():
    """Import ``torch_pruning``, and return it.

    Raises:
        UserError: If the package is not installed.
    """
    require_packages('pruning', 'pruning', 'torch_pruning')
    import torch_pruning

    return torch_pruning


def prune_(
    model: nn.Module,
    ratio: float,
    image_size: Tuple[int, int],
    each_layer: bool = False,
    norm: int = 2,
    round_to: Optional[int] = None,
) -> Dict[str, Tuple[int, int]]:
    """Remove the shortest filters, and the channels that later layers read.

    Layers whose outputs are added must keep the same channels, so they lose
    the same filters. Heads keep their output channels. Layers that convolve
    with another kernel than their weight, such as ``ConvWS2d``, stay as they
    are, and so do the filters that they read; the log names them.

    Args:
        model: A merged network: classifier, segmentor, detector, or any
            module that maps images to tensors. Changed in place, but for its
            modes and for which parameters require gradients.
        ratio: Share of the filters to remove, between 0 and 1.
        image_size: Height and width in pixels of an image that the network
            takes; it runs on one to find out which layers depend on which.
        each_layer: True removes this share of every layer; False removes the
            shortest filters of all layers taken together.
        norm: Norm that measures a filter's length: 1 for L1, 2 for L2.
        round_to: If given, the numbers of channels left are multiples of it.

    Returns:
        dict: Names of the layers that lost filters -> numbers of filters
        before and after.

    Raises:
        UserError: If the network has blocks, a value is not allowed, or the
            network cannot be pruned.
    """
    pruning = require_torch_pruning()
    if not 0 < ratio < 1:
        raise UserError(f'the ratio must lie between 0 and 1, got {ratio:g}')
    if round_to is not None and round_to < 1:
        raise UserError(
            f'channels can be multiples of 1 or more, got {round_to}'
        )
    if find_blocks(model):
        raise UserError(
            f'{type(model).__name__} is not merged: filters can be removed '
            'from merged kernels only, not from branches'
        )
    module = _as_function(model)
    before = _filters(model)
    images = next(model.parameters()).new_zeros(
        2, channels_of(model), *image_size
    )
    try:
        with in_eval_mode(model), _with_gradients(model):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                whole = _heads(model) + _unprunable(module, images)
                pruner = pruning.pruner.MagnitudePruner(
                    module,
                    images,
                    importance=pruning.importance.GroupMagnitudeImportance(
                        p=norm, target_types=[nn.Conv2d, nn.Linear]
                    ),
                    global_pruning=not each_layer,
                    pruning_ratio=ratio,
                    # Comparing filters across layers could remove all
                    # filters of one layer, and so cut the network in two.
                    max_pruning_ratio=max(ratio, 0.9),
                    ignored_layers=whole,
                    round_to=round_to,
                )
                pruner.step()
            with torch.no_grad():
                module(images)
    except UserError:
        raise
    except Exception as error:  # an unknown forward can raise anything
        raise UserError(
            f'{type(model).__name__} cannot be pruned: '
            f'{type(error).__name__}: {error}'
        ) from error
    after = _filters(model)
    changed = {
        name: (count, after[name])
        for name, count in before.items()
        if after[name] != count
    }
    if not changed:
        raise UserError(
            f'no filter was removed by ratio {ratio:g}: '
            f'{_why_none(before, ratio, round_to)}'
        )
    return changed


@contextlib.contextmanager
def _with_gradients(model: nn.Module) -> Iterator[None]:
    """Within the context all parameters require gradients.

    The pruner follows gradients. Pruned parameters are new ones, so what they
    required is remembered by name.
    """
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def _unprunable(module: nn.Module, images: Tensor) -> List[nn.Module]:
    """Layers with a forward of their own, and layers whose filters they read.

    A filter of them is not their weight's, and removing a channel that they
    read may change all of their filters.
    """
    own = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not is_plain(layer)
    }
    if not own:
        return []
    print_log(f'not pruned, {own_forwards(own)}', 'current')
    graph = require_torch_pruning().DependencyGraph()
    graph.build_dependency(module, example_inputs=images)
    left = set(own.values())
    for group in graph.get_all_groups():
        touched = {item.dep.target.module for item in group}
        if touched & set(own.values()):
            left.add(group[0].dep.target.module)
    return list(left)


def _why_none(
    filters: Dict[str, int], ratio: float, round_to: Optional[int]
) -> str:
    """Why pruning removed nothing, as far as one can tell.

    Args:
        filters: Names of the layers -> numbers of their filters.
        ratio: Share of the filters that was to be removed.
        round_to: Number that the channels left are multiples of, or None.
    """
    widest = max(filters.values(), default=0)
    if round_to and widest * ratio < round_to:
        return f'it is too small to leave multiples of {round_to}'
    if widest * (1 - ratio) < (round_to or 1):
        return 'it is too large for the layers, which would have no filter'
    return 'all layers belong to heads, or feed layers that cannot be pruned'


class Cost(NamedTuple):
    """Size and work of a network.

    Attributes:
        parameters: Number of parameters.
        flops: Floating-point operations for one image; a multiplication and
            an addition count as two.
    """

    parameters: int
    flops: int


@torch.no_grad()
def cost_of(model: nn.Module, image_size: Tuple[int, int]) -> Cost:
    """Count a network's parameters, and its operations on one image.

    Args:
        model: A network, in eval mode.
        image_size: Height and width of the image in pixels.
    """
    images = next(model.parameters()).new_zeros(
        1, channels_of(model), *image_size
    )
    with FlopCounterMode(display=False) as counter:
        _as_function(model)(images)
    return Cost(count_parameters(model), counter.get_total_flops())


def _as_function(model: nn.Module) -> nn.Module:
    return export_module(model, head=is_detector(model))


def _filters(model: nn.Module) -> Dict[str, int]:
    return {
        name: module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def _heads(model: nn.Module) -> List[nn.Module]:
    """Layers to keep whole: each of their channels has a meaning."""
    names = (*DENSE_HEADS, *FEATURE_READERS)
    heads = [getattr(model, name, None) for name in names]
    heads = [head for head in heads if isinstance(head, nn.Module)]
    if heads:
        return heads
    layers = [
        m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    return layers[-1:]  # a network without heads: its last layer
