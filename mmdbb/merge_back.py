# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Undo the inserting of blocks, with what the blocks learned.

``insert_blocks_`` notes on each block what it took the place of. So the model
itself tells what it was before; no copy of the original is needed, and a
model that was pickled as a whole, as YOLO's checkpoints are, can be merged
where only its file is left.
"""

from __future__ import annotations

import inspect
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.files.sources import some
from mmdbb.reparam import find_blocks, reparameterize
from mmdbb.stock_weights import norm_that_adds

__all__ = ['merge_back_']


class Replaced(NamedTuple):
    """What a block took the place of.

    Attributes:
        bias: Whether the convolution had a bias.
        reader: The module that alone reads the block's output and can take
            its bias: the ``AbsorbedNorm`` in place of the norm that the block
            absorbed, or a batch norm that stayed. Empty if there is none.
            It stands in a tuple, so that it is no child of the block.
        norm: Arguments of the absorbed norm; None if none was absorbed.
        norm_type: Its class.
    """

    bias: bool
    reader: Tuple[nn.Module, ...] = ()
    norm: Optional[Dict[str, Any]] = None
    norm_type: Optional[type] = None

    @classmethod
    def of(
        cls,
        conv: nn.Module,
        norm: Any,
        place: Optional[nn.Module],
    ) -> Replaced:
        """Note a convolution, and the norm that alone reads its output.

        Args:
            conv: The convolution.
            norm: The norm; None if there is no such norm.
            place: What takes the norm's place; None if the norm stays.
        """
        bias = conv.bias is not None
        if place is not None:
            norm_args = dict(
                num_features=norm.num_features,
                eps=norm.eps,
                momentum=norm.momentum,
                affine=norm.affine,
            )
            return cls(bias, (place,), norm_args, type(norm))
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            return cls(bias, (norm,))
        return cls(bias)


@torch.no_grad()
def merge_back_(model: nn.Module) -> List[str]:
    """Merge the blocks of a model, and give it its old structure, in place.

    Convolutions and norms come back under their names, with the entries of
    the state dict that the model had before :func:`insert_blocks_`. In eval
    mode it computes the same as with blocks. A convolution without a bias
    gets one only where no batch norm alone reads its output.

    Args:
        model: A model into which :func:`insert_blocks_` put blocks. It may
            have been copied, pickled, or converted to another precision.

    Returns:
        list: Names of the convolutions that were blocks.

    Raises:
        ValueError: If the model has no blocks, some were not inserted by
            :func:`insert_blocks_` (``reparameterize`` merges those), the
            model lacks the norm behind a block, because it is a part of the
            whole, or a merged kernel is not finite. The model is then
            unchanged.

    Examples:
        >>> import mmdbb
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> names = mmdbb.insert_blocks_(model)
        >>> merge_back_(model)
        ['0']
        >>> [type(layer).__name__ for layer in model]
        ['Conv2d', 'BatchNorm2d']
    """
    blocks = find_blocks(model)
    noted: Dict[str, Any] = {n: _replaced(b) for n, b in blocks.items()}
    others = [name for name, replaced in noted.items() if replaced is None]
    if others:
        raise ValueError(
            f'insert_blocks_ did not insert {some(others)}; '
            'merge with mmdbb.reparameterize(model)'
        )
    within = set(model.modules())
    apart = [
        name
        for name, replaced in noted.items()
        if not within.issuperset(replaced.reader)
    ]
    if apart:
        raise ValueError(
            f'the norms behind {some(apart)} are no part of this '
            f'{type(model).__name__}: call merge_back_ with the whole model, '
            'or merge with mmdbb.reparameterize(model)'
        )
    # Nothing is changed before all kernels are composed and checked.
    merged: Dict[str, Any]
    merged = dict(reparameterize(model).named_modules(remove_duplicate=False))
    new: Dict[nn.Module, nn.Module] = {}
    biases: Dict[Any, Tensor] = {}
    for name, block in blocks.items():
        if block in new:
            continue
        new[block] = conv = merged[name]
        trains = any(p.requires_grad for p in block.parameters())
        conv.requires_grad_(trains)
        replaced: Any = _replaced(block)  # looked at above
        reader: Any = replaced.reader[0] if replaced.reader else None
        bias = conv.bias
        if bias is None:
            bias = conv.weight.new_zeros(conv.out_channels)
        if replaced.norm is not None:
            adds = torch.zeros_like(bias) if replaced.bias else bias.detach()
            norm = _norm_of(replaced, adds).train(block.training)
            new[reader] = norm.requires_grad_(trains)
        elif reader is not None and not replaced.bias:
            biases[reader] = bias
        if reader is not None and not replaced.bias:
            conv.bias = None
    for norm, bias in biases.items():
        mean = norm.running_mean
        mean.copy_(mean.double() - bias.to(mean.device).double())
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, attribute, new[child])
    if isinstance(vars(model).get('fuse'), MergeThenFuse):
        del model.fuse
    return list(blocks)


def _replaced(block: ReparamConv2d) -> Optional[Replaced]:
    return getattr(block, 'replaced', None)


def _norm_of(replaced: Any, bias: Tensor) -> nn.Module:
    norm = replaced.norm_type(**replaced.norm).to(bias)
    entries = norm_that_adds(bias, norm, '')
    norm.load_state_dict({n.lstrip('.'): v for n, v in entries.items()})
    return norm


class MergeThenFuse:
    """A model's own method ``fuse``, after its blocks are merged.

    The fusing code of YOLO's models reads the weight of each convolution and
    the statistics of the norm behind it. Their trainer, validator and
    exporter call it by themselves.

    Args:
        model: The model whose ``fuse`` this replaces. The two are copied and
            pickled together.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        merge_back_(self.model)
        return self.model.fuse(*args, **kwargs)


def merge_before_fuse_(model: nn.Module) -> None:
    """If a model has a method ``fuse``, let it merge its blocks first.

    Args:
        model: The model.
    """
    if inspect.isfunction(getattr(type(model), 'fuse', None)):
        own: Any = model
        own.fuse = MergeThenFuse(model)
