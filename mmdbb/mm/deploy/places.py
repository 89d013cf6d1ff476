# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Whether the stock network will have a place for each merged bias.

Merging gives most blocks a bias. The stock network can hold it in its
convolution, if that has a bias, or in the mean of a batch norm behind it.
Before a group norm it can hold it nowhere.
"""

from __future__ import annotations

import contextlib
from types import MethodType
from typing import Dict, Iterable, Iterator, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.found_norms import absorbed_norms
from mmdbb.geometry import convolve
from mmdbb.mm.data_flow import norms_of
from mmdbb.modules import drops_bias, takes_bias
from mmdbb.reparam import find_blocks


class NoPlace(NamedTuple):
    """Blocks whose merged bias has no place in the stock network.

    Attributes:
        readers: Name of such a block -> classes of the norms that are known
            to follow, which is none where another layer reads its output.
        reason: Why names and not the data told which norms follow; empty if
            all was found by the data.
    """

    readers: Dict[str, Tuple[str, ...]]
    reason: str


def without_place(model: nn.Module) -> NoPlace:
    """Find the blocks whose merged bias the stock network cannot hold.

    Args:
        model: The network with blocks, not wrapped; unchanged. If there may
            be such blocks, it is run in eval mode on a random image.
    """
    absorbed = absorbed_norms(model)
    doubtful = {}
    for name, block in find_blocks(model).items():
        if block.adds_bias and name not in absorbed and block not in doubtful:
            doubtful[block] = name
    if not doubtful:
        return NoPlace({}, '')
    with _shapes_only(find_blocks(model).values()):
        found = norms_of(model)
    readers = {}
    for name in doubtful.values():
        norms = [model.get_submodule(n) for n in found.pairs.get(name, ())]
        if not norms or not all(
            takes_bias(norm) or drops_bias(norm) for norm in norms
        ):
            kinds = dict.fromkeys(type(norm).__name__ for norm in norms)
            readers[name] = tuple(kinds)
    return NoPlace(readers, found.reason)


@contextlib.contextmanager
def _shapes_only(blocks: Iterable[ReparamConv2d]) -> Iterator[None]:
    """Within the context, blocks return zeros of the shape of their output.

    Where the data flows does not depend on their values, and composing their
    kernels would take most of the time.
    """
    changed = [block for block in blocks if not block.deploy]
    for block in changed:
        block.forward_train = MethodType(_zeros_of, block)
    try:
        yield
    finally:
        for block in changed:
            vars(block).pop('forward_train', None)


def _zeros_of(block: ReparamConv2d, x: Tensor) -> Tensor:
    spec = block.spec
    kernel = torch.empty(spec.weight_shape, dtype=x.dtype, device='meta')
    like = convolve(
        x.to('meta'), kernel, None, spec.at_size(x.shape[-spec.dims :])
    )
    return x.new_zeros(like.shape)
