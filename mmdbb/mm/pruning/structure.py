# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Remove filters from a merged network, and count what the rest costs.

No config can state how many filters each layer of a pruned network has left.
So the tools write the stock network's config and the pruned weights, and
``mmdbb.load_deployed`` takes the sizes of the layers from the weights' shapes.
"""

from __future__ import annotations

import warnings
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdbb.errors import UserError, require_packages
from mmdbb.mm.export.modules import (
    FEATURE_READERS,
    export_module,
    is_detector,
)
from mmdbb.modules import count_parameters, in_eval_mode
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
    the same filters. Heads keep their output channels.

    Args:
        model: A merged network: classifier, segmentor, detector, or any
            module that maps images to tensors. Changed in place.
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
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # the pruner follows gradients
    before = _filters(model)
    images = next(model.parameters()).new_zeros(
        2, _channels(model), *image_size
    )
    try:
        with in_eval_mode(model):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
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
                    ignored_layers=_heads(model),
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
            f'no filter was removed by ratio {ratio:g}: it is too small for '
            'the layers, or all of them belong to heads'
        )
    return changed


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
        1, _channels(model), *image_size
    )
    with FlopCounterMode(display=False) as counter:
        _as_function(model)(images)
    return Cost(count_parameters(model), counter.get_total_flops())


def _as_function(model: nn.Module) -> nn.Module:
    return export_module(model, head=is_detector(model))


def _channels(model: nn.Module) -> int:
    """Number of channels of the network's images."""
    return next(
        m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)
    )


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
