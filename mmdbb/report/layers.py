# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Measure the blocks of a network: their branches, kernels and ranges."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.modules import count_parameters, is_known
from mmdbb.ranges import weight_range
from mmdbb.report.figures import (
    BranchFigures,
    Cost,
    Gammas,
    LayerFigures,
    Lost,
)
from mmdbb.shares import BranchShare, branch_kernels, branch_shares
from mmdbb.transforms import KernelBias

#: Filters of each layer that a page shows.
FILTERS = 64


class Layer:
    """A block, and what the merged network has in its place.

    Args:
        name: The block's name in the network.
        block: The block, not merged, in eval mode.
        norm: The batch norm behind it, if there is one alone.
        norm_name: Name of that norm.

    Attributes:
        parts: Name of each branch -> its part of the merged kernel and bias.
    """

    def __init__(
        self,
        name: str,
        block: ReparamConv2d,
        norm: Optional[_BatchNorm],
        norm_name: str,
    ) -> None:
        self.name, self.block = name, block
        usable = norm is not None and is_known(norm)
        self._norm, self._norm_name = norm, norm_name if usable else ''
        biases = _biases(block)
        # In single precision: those of all layers are kept at once.
        self.parts: Dict[str, KernelBias] = {
            branch: KernelBias(
                kernel.float(), biases.get(branch, zeros(kernel)).float()
            )
            for branch, kernel in branch_kernels(block).items()
        }

    def figures(
        self,
        conv: nn.Module,
        flops: List[Optional[int]],
        lost: Dict[str, Lost],
        difference: Optional[float],
    ) -> LayerFigures:
        """Measure the layer.

        Args:
            conv: The convolution that the merged network has instead.
            flops: Operations before and after merging, for one image.
            lost: Branches -> what is lost without them.
            difference: See :class:`LayerFigures`.
        """
        block, shares = self.block, branch_shares(self.block)
        kernel: Any = sum(part.kernel for part in self.parts.values())
        folded = kernel
        if self._norm is not None and self._norm_name:
            scale = norm_scale_shift(self._norm).scale.to(kernel)
            folded = kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1))
        return LayerFigures(
            name=self.name,
            kind=type(block).__name__,
            shape=tuple(kernel.shape),
            geometry=_geometry(block),
            branches={
                branch: _branch(
                    share, self._gammas(branch, i), self.parts[branch].kernel
                )._replace(lost=lost.get(branch))
                for i, (branch, share) in enumerate(shares.branches.items())
            },
            taps=taps_of(kernel),
            filters=kernel[:FILTERS].float(),
            range=weight_range(folded),
            folded=self._norm_name,
            before=Cost(count_parameters(block), flops[0]),
            after=Cost(count_parameters(conv), flops[1]),
            difference=difference,
        )

    def _gammas(self, branch: str, row: int) -> Optional[Gammas]:
        kind, block = 'gamma', self.block
        if isinstance(block, BranchSumConv2d):
            norm = block.branches[branch].last_norm
            values = None if norm is None else norm.weight
        else:
            kind = 'scale'
            scale = getattr(block.generator, 'scale', None)
            values = None if scale is None else scale[row]
        if values is None:
            return None
        sizes = values.detach().double().abs()
        found = sizes.min(), sizes.median(), sizes.max()
        return Gammas(kind, *(value.item() for value in found))


@torch.no_grad()
def _biases(block: ReparamConv2d) -> Dict[str, Tensor]:
    """What each branch adds to the merged bias, in float64."""
    if not isinstance(block, BranchSumConv2d):
        return {}
    biases = {
        name: block.kernel_bias_of(branch).bias.double().cpu()
        for name, branch in block.branches.items()
    }
    if block.norm is None:
        return biases
    scale = norm_scale_shift(block.norm).scale.double().cpu()
    return {name: bias * scale for name, bias in biases.items()}


def zeros(kernel: Tensor) -> Tensor:
    """A bias of zeros for a kernel."""
    return kernel.new_zeros(len(kernel))


def taps_of(kernel: Tensor) -> Tensor:
    """Mean magnitude of a kernel at each tap.

    Args:
        kernel: Shape (out, in / groups, kH, kW).

    Returns:
        Tensor: Shape (kH, kW).
    """
    return kernel.detach().abs().mean((0, 1)).float()


def _branch(
    share: BranchShare, gammas: Optional[Gammas], kernel: Tensor
) -> BranchFigures:
    return BranchFigures(
        share=share.share,
        projection=share.projection,
        angle=_degrees(_cosine(share)),
        angles={n: _degrees(cosine) for n, cosine in share.cosines.items()},
        gammas=gammas,
        taps=taps_of(kernel),
        lost=None,
    )


def _cosine(share: BranchShare) -> float:
    """Cosine of the angle between a branch's kernel and the merged one."""
    return share.projection / share.share if share.share else math.nan


def _degrees(cosine: float) -> Optional[float]:
    if not math.isfinite(cosine):
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def _geometry(block: ReparamConv2d) -> str:
    """The arguments that differ from the usual, in words."""
    texts = []
    for name in ('stride', 'dilation'):
        value = getattr(block, name)
        if any(v != 1 for v in value):
            same = len(set(value)) == 1
            shown = value[0] if same else '×'.join(map(str, value))
            texts.append(f'{name} {shown}')
    if block.groups != 1:
        texts.append(f'{block.groups} groups')
    return ', '.join(texts)
