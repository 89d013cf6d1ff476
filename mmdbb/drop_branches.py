# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""Drop branches of trained blocks, and leave the merged kernel as it is.

The kernel and bias of a dropped branch are added to the block's ``kxk``
branch, whose kernel may be any. Let :math:`W, \gamma, \beta, \mu, \sigma^2` be
that branch's kernel and norm, :math:`s = \gamma / \sigma`, and K, b the kernel
and bias of what is dropped. Then

.. math:: W' = W + K / s, \quad \beta' = \beta + \beta_d, \quad
    \mu' = \mu + (\beta_d - b) / s

where :math:`\beta_d` is the mean of the dropped branches' output, as the bias
of their last norms says. The output in eval mode is the same number by number.
In training the norm uses statistics of the batch: their mean is
:math:`\mu'` as far as running statistics tell, so that only the variance of
:math:`W' x` is not known. It is taken to be the sum of both variances, as if
the branches were uncorrelated, and gamma grows with its root.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d, refuse_merged
from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.branches.base import Branch, kernel_of
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.dimensions import CONVS
from mmdbb.errors import UserError
from mmdbb.files.sources import some
from mmdbb.modules import cast, fresh_weights, tensors_of
from mmdbb.reparam import find_blocks
from mmdbb.scale_norm import ScaleNorm
from mmdbb.shares import model_shares

#: A channel of the ``kxk`` branch whose scaled kernel is smaller than this
#: share of what is folded into it gets the scale 1: its own may be zero.
_TINY = 1e-4


def weak_branches(
    model: nn.Module, threshold: float = 0.05
) -> Dict[str, List[str]]:
    """List the branches whose share of the merged kernel is small.

    Args:
        model: A network with trained blocks; unchanged.
        threshold: Largest share to list, see
            :class:`~mmdbb.shares.BranchShare`.

    Returns:
        dict: Name of each block -> its weak branches. Blocks without one are
        not listed, and neither are those that have no ``kxk`` branch, into
        which the others could be folded; that one always stays.

    Raises:
        ValueError: If the threshold is negative, or a block's branches cannot
            be measured.
    """
    if not threshold >= 0:
        raise ValueError(f'threshold must be at least 0, got {threshold!r}')
    blocks, found = find_blocks(model), {}
    for name, shares in model_shares(model).items():
        block = blocks[name]
        if not isinstance(block, BranchSumConv2d):
            continue
        target = _target(block)
        weak = [
            key
            for key, branch in shares.branches.items()
            if key != target and branch.share <= threshold
        ]
        if target is not None and weak:
            found[name] = weak
    return found


@torch.no_grad()
def drop_branches_(
    model: nn.Module,
    dropped: Mapping[str, Sequence[str]],
    fold: bool = True,
) -> None:
    """Drop branches of blocks, in place.

    With ``fold`` the network computes the same in eval mode, see the module's
    docstring. All blocks are checked before the first is changed. The
    parameters of the dropped branches are gone: build the optimizer anew.

    Args:
        model: A network with blocks.
        dropped: Name of each block -> names of the branches to drop.
        fold: Whether to fold what is dropped into the ``kxk`` branch.

    Raises:
        UserError: If there is no such block or branch, none would be left, or
            there is no branch to fold into.

    Examples:
        >>> from mmdbb import DBB
        >>> model = nn.Sequential(DBB(4, 8, 3)).eval()
        >>> drop_branches_(model, {'0': ['1x1', '1x1_avg']})
        >>> list(model[0].branches)
        ['kxk', '1x1_kxk']
    """
    blocks, changes = find_blocks(model), {}
    for name, keys in dropped.items():
        if name not in blocks:
            raise UserError(
                f'no block {name!r} to drop branches of; the network has '
                f'{some(list(blocks)) or "none"}'
            )
        block = blocks[name]
        if block in changes:
            raise UserError(f'{name} is a block that is listed already')
        try:
            changes[block] = keys, _checked(block, keys, fold)
        except ValueError as error:
            raise UserError(f'{name}: {error}') from error
    for block, (keys, change) in changes.items():
        for entry, value in change.items():
            entry.copy_(value)
        for key in keys:
            del block.branches[key]
        block._cached_kernel = None


def _checked(
    block: ReparamConv2d, keys: Sequence[str], fold: bool
) -> Dict[Tensor, Tensor]:
    """Check what is dropped; tensors of the block -> their new values."""
    if not isinstance(block, BranchSumConv2d):
        raise ValueError(
            f'a {type(block).__name__} composes its kernel: its branches '
            'cannot be dropped one by one'
        )
    refuse_merged(block, 'branches to drop')
    if isinstance(keys, str) or len({*keys}) < len(keys):
        raise ValueError(f'the branches must be a list, got {keys!r}')
    unknown = [key for key in keys if key not in block.branches]
    if unknown:
        raise ValueError(
            f'it has no branches {unknown}; they are {list(block.branches)}'
        )
    if len(keys) == len(block.branches):
        raise ValueError(f'no branch would be left of {list(block.branches)}')
    changes = _folded(block, keys) if fold and keys else {}
    if not all(value.isfinite().all() for value in changes.values()):
        raise ValueError(
            'what would be folded is not finite: a parameter or a running '
            'statistic of the block is NaN or infinite, or a variance is '
            'negative'
        )
    return changes


def _target(
    block: BranchSumConv2d, without: Sequence[str] = ()
) -> Optional[str]:
    """Name of the branch that can take any kernel; None if there is none."""
    for key, branch in block.branches.items():
        conv = getattr(branch, 'conv', None)
        if (
            key not in without
            and isinstance(conv, CONVS)
            and tuple(conv.weight.shape) == tuple(block.spec.weight_shape)
            and 'weight' in conv._parameters
        ):
            return key
    return None


def _folded(
    block: BranchSumConv2d, keys: Sequence[str]
) -> Dict[Tensor, Tensor]:
    target = _target(block, keys)
    if target is None:
        raise ValueError(
            f'without {list(keys)} no branch is left that any kernel can be '
            "folded into, as into 'kxk'"
        )
    if any(tensor.is_meta for tensor in tensors_of(block)):
        raise ValueError('it is on the meta device, where it has no values')
    exact = cast(block, 'cpu', torch.float64)
    with fresh_weights(exact):
        parts = [_Dropped.of(exact, exact.branches[key]) for key in keys]
    kernel: Any = sum(part.kernel for part in parts)
    bias: Any = sum(part.bias for part in parts)
    mean: Any = sum(part.mean for part in parts)
    var: Any = sum(part.var for part in parts)
    own: Any = block.branches[target]
    new: Any = exact.branches[target]
    weight, norm = kernel_of(new.conv.weight, block.spec), new.norm
    if norm is None:
        return _without_norm(block, own, weight + kernel, bias)
    scale = norm_scale_shift(norm).scale
    size = weight.flatten(1).norm(dim=1) * scale.abs()
    tiny = size < _TINY * kernel.flatten(1).norm(dim=1)
    if norm.weight is None:
        tiny = torch.zeros_like(tiny)
    target_scale = torch.where(tiny, 1.0, scale)
    wide = [-1, *[1] * (weight.dim() - 1)]
    changes = {
        own.conv.weight: kernel_of(
            (weight * scale.reshape(wide) + kernel)
            / target_scale.reshape(wide),
            block.spec,
        )
    }
    shift = mean - bias
    if norm.bias is not None:
        changes[own.norm.bias] = norm.bias + mean
    else:
        shift = -bias
    if not isinstance(norm, ScaleNorm):
        changes[own.norm.running_mean] = (
            scale * norm.running_mean + shift
        ) / target_scale
    elif bias.any():
        raise ValueError(
            f'{list(keys)} add a bias, and the norms of the branch {target!r} '
            'add none'
        )
    if norm.weight is not None:
        spread = (scale.square() * norm.running_var + var) / (
            target_scale.square()
        )
        changes[own.norm.running_var] = spread
        changes[own.norm.weight] = target_scale * (spread + norm.eps).sqrt()
    return changes


def _without_norm(
    block: BranchSumConv2d, own: Any, kernel: Tensor, bias: Tensor
) -> Dict[Tensor, Tensor]:
    changes = {own.conv.weight: kernel_of(kernel, block.spec)}
    if bias.any():
        if block.own_bias is not None:
            changes[block.own_bias] = block.own_bias.double().cpu() + bias
        elif block.norm is not None and block.norm.running_mean is not None:
            # A norm behind the sum takes a bias off its mean.
            before = block.norm.running_mean.double().cpu()
            changes[block.norm.running_mean] = before - bias
        else:
            raise ValueError(
                'what is dropped adds a bias, and what is left has no place '
                'for one'
            )
    return changes


class _Dropped:
    """What a dropped branch does: kernel, bias, mean and variance."""

    def __init__(self, kernel, bias, mean, var) -> None:
        self.kernel, self.bias, self.mean, self.var = kernel, bias, mean, var

    @classmethod
    def of(cls, block: BranchSumConv2d, branch: Branch) -> _Dropped:
        kernel, bias = block.kernel_bias_of(branch)
        norm: Any = branch.last_norm
        if norm is None:
            return cls(kernel, bias, bias, torch.zeros_like(bias))
        mean = torch.zeros_like(bias) if norm.bias is None else norm.bias
        scale = norm_scale_shift(norm).scale
        return cls(kernel, bias, mean, scale.square() * norm.running_var)
