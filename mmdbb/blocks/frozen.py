# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The forward pass of a branch sum whose norms are in eval mode.

It is one convolution. The kernel is composed in float32 or better, also for
images in half precision, so that it is rounded only once. In training with
frozen norms, as mmdet does it, gradients flow through the kernel to the
parameters of all branches.

The papers' code detaches the border value, so no gradient flows through it;
the composed kernel would let it flow. We add ``shift.detach() - shift``, which
is zero and cancels that gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, List, Optional, Sequence

import torch
from torch import Tensor

from mmdbb.blocks.kernel_cache import cached_kernel, can_keep
from mmdbb.branches.base import Branch, leaf_dtype
from mmdbb.branches.moments import near_dtype, pixels_of
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.branches.pointwise_avg import PointwiseAvg
from mmdbb.branches.pointwise_kxk import PointwiseKxK, mask_kernel
from mmdbb.dimensions import CONV, per_channel
from mmdbb.geometry import add_shift, border_mask, convolve
from mmdbb.modules import cast, tensors_of
from mmdbb.recompute import is_compiling, without_autocast
from mmdbb.transforms import KernelBias

if TYPE_CHECKING:
    from mmdbb.blocks.branch_sum import BranchSumConv2d


def frozen_forward(
    block: BranchSumConv2d, x: Tensor, dtype: torch.dtype
) -> Optional[Tensor]:
    """Run a branch sum with frozen norms as one convolution.

    Args:
        block: A ``BranchSumConv2d`` that is not merged, all of whose norms
            are in eval mode.
        x: Images of shape (N, in, H, W).
        dtype: Precision of the convolution.

    Returns:
        Tensor: Shape (N, out, H', W'); None where running the branches one by
        one is cheaper.
    """
    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, *tensors_of(block))
    )
    near = near_dtype(leaf_dtype(block))
    alone = _without_convolution(block)
    out = torch.promote_types(x.dtype, dtype) if alone else dtype
    if not needs_grad and not is_compiling() and can_keep(x.device):
        kernel, bias = cached_kernel(block, lambda: composed(block, near))
        y = convolve(x.to(dtype), kernel, bias.to(dtype), block.spec)
        return y.to(out)
    if needs_grad and dtype is torch.float16 and x.device.type == 'cpu':
        # Processors without arithmetic in float16 sum a kernel's gradient in
        # it, and the gradients of all branches come from that one.
        dtype = near
    if block.spec.in_channels // block.spec.groups > pixels_of(x):
        return None  # composing costs more products than it saves
    # A branch without a convolution has exact gradients; through a convolution
    # in half precision they would be rounded. So it runs by itself.
    exact = dtype == near or block.norm is not None
    apart = [] if exact or not needs_grad else alone
    if len(apart) == len(block.branches):
        return None
    kernel, bias = composed(block, near, apart)
    with without_autocast(x.device):
        y = convolve(x.to(dtype), kernel, bias, block.spec)
        if needs_grad:
            y = _without_border_gradient(y, block, x, near)
        for branch in apart:
            y = y + branch(x)
    return y.to(out)


def _without_convolution(block: BranchSumConv2d) -> List[Branch]:
    """Branches that have norms only; autocast does not touch these."""
    return [
        branch
        for branch in block.branches.values()
        if not any(t.dim() > 1 for t in tensors_of(branch))
    ]


def composed(
    block: BranchSumConv2d,
    dtype: torch.dtype,
    without: Sequence[Branch] = (),
) -> KernelBias:
    """Compose a block's kernel and bias.

    Args:
        block: A ``BranchSumConv2d`` that is not merged.
        dtype: Precision to compose in.
        without: Branches to leave out.
    """
    with without_autocast(next(tensors_of(block)).device):
        if dtype == leaf_dtype(block):
            return block.in_torchs_layout(block._compose(without))
        names = [k for k, b in block.branches.items() if b in without]
        twin = cast(block, None, dtype)
        merged = twin._compose([twin.branches[name] for name in names])
        return block.in_torchs_layout(merged)


def _without_border_gradient(
    y: Tensor, block: BranchSumConv2d, x: Tensor, dtype: torch.dtype
) -> Tensor:
    """Add a zero whose gradient cancels the gradient through the border."""
    after = None if block.norm is None else norm_scale_shift(block.norm)
    for branch in block.branches.values():
        kernel = _border_kernel(branch)
        if kernel is None:
            continue
        if after is not None:
            kernel = kernel * per_channel(after.scale, block.dims + 1)
        spec = branch.spec
        nothing = CONV[spec.dims](
            border_mask(x, spec.pads).to(dtype),
            kernel.to(dtype),
            stride=spec.stride,
            dilation=spec.dilation,
        )
        y = add_shift(y, nothing)
    return y


def _border_kernel(branch: Branch) -> Optional[Tensor]:
    """A kernel of zeros that cancels the gradient through a branch's border.

    It reads a mask of the border. Its values have the gradient of the border
    value with the other sign.

    Returns:
        Tensor: Shape (out, 1, kH, kW); None if the branch has no border
        between two layers, or its first norm needs no gradient.
    """
    spec, norm = branch.spec, getattr(branch, 'norm1', None)
    if (
        norm is None
        or not spec.has_border
        or not any(t.requires_grad for t in tensors_of(norm))
    ):
        return None
    shift = norm_scale_shift(norm).shift
    nothing = shift.detach() - shift
    last: Any = branch.last_norm  # as there is a norm1
    scale = norm_scale_shift(last).scale
    if isinstance(branch, PointwiseKxK):
        kernel = mask_kernel(branch.conv2.weight, nothing, spec.groups)
        return kernel * per_channel(scale, spec.dims + 1)
    assert isinstance(branch, PointwiseAvg)
    share = scale * nothing / math.prod(spec.kernel_size)
    kernel = per_channel(share, spec.dims + 1)
    return kernel.expand(-1, -1, *spec.kernel_size)
