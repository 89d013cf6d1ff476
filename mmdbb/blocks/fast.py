# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""The fast forward pass of a branch sum: same arithmetic, less work.

Outputs, gradients and running statistics are those of
:meth:`BranchSumConv2d.forward_branches`; only the way there differs. Without
this file the package is slower and as correct. Norms in eval mode are
:mod:`mmdbb.blocks.frozen`'s; in training mode each branch has its ways:

==========  =======================  ========================================
branch      where                    way
==========  =======================  ========================================
1x1_kxk     many pixels a channel    collapsed to one kernel
1x1         beside such a branch     scaled by statistics known before
1x1         few channels to many     computed again
1x1_avg     beside such a branch     pooled first, computed again
1x1_avg     elsewhere                computed again
all         depthwise                the whole sum is computed again
all         small batches            as they are
==========  =======================  ========================================

*Statistics known before.* See :mod:`mmdbb.branches.moments`: the norm behind
a 1x1 is a scale a and a shift c before the 1x1 is computed.

*Collapsed.* A 1x1, norm and KxK are one kernel :math:`W_2 \circ (a W_1)` on
x, plus what the KxK makes of an image of constants: c inside, the value v on
the border.

*Pooled first.* Pooling commutes with a 1x1: with q the zero-padded pooling of
x and b that of an image of zeros with a border of ones, what the second norm
reads is a P q + c + (v - c) b. It is computed again in the backward pass
instead of being kept.

*Half precision.* Under autocast, and of half-precision networks, kernels are
composed in float32, images and convolutions in half. Statistics are those of
maps that are not kept, as on a GPU: the gradient of a gamma from a kernel's
gradient, which is rounded to half, would lose what its mean takes.

What is computed again gets the border values of its own forward pass, because
the running statistics, which they come from, move on.
"""

from __future__ import annotations

from typing import Callable, Dict, List, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.frozen import frozen_forward
from mmdbb.branches.base import ConvNormBranch
from mmdbb.branches.composed import Generated
from mmdbb.branches.identity import Identity
from mmdbb.branches.moments import (
    Maps,
    Moments,
    moments_of,
    near_dtype,
    pixels_of,
    synchronizes,
)
from mmdbb.branches.norm import (
    batch_scale_shift,
    border_value,
    norm_then_pad,
    run_norm,
)
from mmdbb.branches.pointwise import Pointwise
from mmdbb.branches.pointwise_avg import PointwiseAvg
from mmdbb.branches.pointwise_kxk import (
    IdentityConv1x1,
    PointwiseKxK,
    mask_kernel,
)
from mmdbb.geometry import (
    ConvSpec,
    add_shift,
    border_mask,
    convolve,
    pad2d,
)
from mmdbb.kernels import ComposedKernel
from mmdbb.modules import is_known, is_replica, is_watched
from mmdbb.recompute import (
    again,
    autocast_dtype,
    is_compiling,
    is_transformed,
    without_autocast,
)
from mmdbb.transforms import compose_1x1_kxk

# ---------------------------------------------------------------- dispatch


def fast_forward(block: nn.Module, x: Tensor) -> Tensor:
    """What ``block.forward_branches(x)`` gives, by the cheapest way known.

    Args:
        block: A ``BranchSumConv2d`` that is not merged.
        x: Images of shape (N, in, H, W).

    Returns:
        Tensor: Shape (N, out, H', W').
    """
    norms = _norms_of(block)
    modes = {norm.training for norm in norms}
    if len(modes) != 1 or (modes == {True} and _stays_literal(block, x)):
        return block.forward_branches(x)
    y, dtype = None, _conv_dtype(block, norms, x)
    if dtype is not None and _is_left_alone(block, x):
        if modes == {False}:
            y = frozen_forward(block, x, dtype)
        elif _share_statistics_alike(norms):
            y = _training_forward(block, x, dtype)
    return block.forward_branches(x) if y is None else y


def _norms_of(block: nn.Module) -> List[_BatchNorm]:
    places = [*block.branches.values(), block]
    children = [m for place in places for m in place._modules.values()]
    return [m for m in children if isinstance(m, _BatchNorm)]


def _conv_dtype(
    block: nn.Module, norms: List[_BatchNorm], x: Tensor
) -> Optional[torch.dtype]:
    """What the branches' convolutions compute in; None where they refuse."""
    of_norms = {id(p) for norm in norms for p in norm.parameters()}
    kernels = {p.dtype for p in block.parameters() if id(p) not in of_norms}
    if any(norm.running_mean is None for norm in norms):
        return None
    scales = {norm.running_mean.dtype for norm in norms}
    halves = {torch.float16, torch.bfloat16, torch.float32}
    half = autocast_dtype(x.device.type)
    if half is not None and {x.dtype, *kernels, *scales} <= halves:
        return half
    if kernels <= {x.dtype} and scales <= {x.dtype, near_dtype(x.dtype)}:
        return x.dtype if x.is_floating_point() else None
    return None


def _is_left_alone(block: nn.Module, x: Tensor) -> bool:
    """Whether nothing watches or changes what happens inside the branches."""
    if not is_compiling() and (torch.jit.is_tracing() or is_transformed()):
        return False
    if x.is_meta or is_replica(block) or is_watched(block):
        return False
    layers = [m for b in block.branches.values() for m in b.children()]
    own = (IdentityConv1x1, ComposedKernel)
    return all(
        is_known(layer) or isinstance(layer, own)
        for layer in (*layers, *filter(None, [block.norm]))
    )


def _share_statistics_alike(norms: List[_BatchNorm]) -> bool:
    """Whether all norms see one batch, of this or of the same processes.

    No compiler sees through what is summed over processes.
    """
    shared = {
        (synchronizes(norm), getattr(norm, 'process_group', None))
        for norm in norms
    }
    return len(shared) == 1 and not (next(iter(shared))[0] and is_compiling())


def _stays_literal(block: nn.Module, x: Tensor) -> bool:
    """Whether a batch is small, or so small that norms refuse it.

    With SyncBN it is neither: processes must all go one way, whatever the
    size of their own images.
    """
    if any(map(synchronizes, _norms_of(block))):
        return False
    pixels = pixels_of(x)
    if pixels <= 1 or _batch_pixels(block.spec, x) <= 1:
        return True
    return _is_small(block.spec, pixels)


def _is_small(spec: ConvSpec, pixels: int) -> bool:
    """Whether a batch costs so little that nothing can be saved.

    What the fast way adds to a step, statistics and kernels, does not grow
    with the batch. Measured by ``--plot`` of tools/benchmark.py.
    """
    if spec.is_depthwise:
        return pixels * spec.in_channels < 25_000
    work = pixels * spec.in_channels * spec.out_channels // spec.groups
    return pixels < 350 or work < 20_000_000


def _batch_pixels(spec: ConvSpec, x: Tensor) -> int:
    """Values a channel in the block's output."""
    top, bottom, left, right = spec.pads
    size = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
    count = x.shape[0]
    for n, k, d, s in zip(size, spec.kernel_size, spec.dilation, spec.stride):
        count *= (n - d * (k - 1) - 1) // s + 1
    return count


# -------------------------------------------------- norms in training mode


class _Batch(NamedTuple):
    """One forward pass of a block.

    Attributes:
        x: The images as they came.
        half: The images as convolutions take them.
        stats: What gives statistics before a 1x1 is computed, or None.
        borders: By norm, or rather the identity of its running mean, the
            value on the border in this forward pass.
    """

    x: Tensor
    half: Tensor
    stats: Union[Moments, Maps, None]
    borders: Dict[int, Tensor]

    def border(self, norm: _BatchNorm, mean: Callable) -> Tensor:
        """See :func:`border_value`; in a second run, what it was before."""
        key = id(norm.running_mean)
        if key not in self.borders:
            self.borders[key] = border_value(norm, mean)
        return self.borders[key]


# The branches whose computation, run again, reads nothing that has moved.
_KNOWN = (
    ConvNormBranch.forward,
    Identity.forward,
    Generated.forward,
    PointwiseAvg.forward,
    PointwiseKxK.forward,
)


def _training_forward(
    block: nn.Module, x: Tensor, dtype: torch.dtype
) -> Optional[Tensor]:
    borders: Dict[int, Tensor] = {}

    def branches(of_block: nn.Module, x: Tensor) -> Tensor:
        return _training_sum(list(of_block.values()), x, dtype, borders)

    if not block.spec.is_depthwise:
        y = branches(block.branches, x)
    elif all(type(b).forward in _KNOWN for b in block.branches.values()):
        y = again(branches, x, module=block.branches)
    else:
        return None  # what is computed again might read what has moved
    if block.bias is not None:
        y = y + block.bias.to(y.dtype).reshape(-1, 1, 1)
    return y if block.norm is None else run_norm(block.norm, y)


def _training_sum(
    branches: List[nn.Module],
    x: Tensor,
    dtype: torch.dtype,
    borders: Dict[int, Tensor],
) -> Tensor:
    stats, half = None, x.to(dtype)
    collapsing = [b for b in branches if _collapses(b, half)]
    if collapsing:
        norm, spec = collapsing[0].norm1, collapsing[0].spec
        serve = _takes_moments(half, spec.is_depthwise)
        stats = (moments_of if serve else Maps)(half, spec.groups, norm)
    batch = _Batch(x, half, stats, borders)
    y = None
    for branch in branches:
        z = _training_branch(branch, batch)
        if y is None:
            y = z
            # An identity without a norm gives the input or a part of it.
            is_new = branch.last_norm is not None
        else:
            in_place = is_new and y.dtype == z.dtype
            y = y.add_(z) if in_place else y + z
            is_new = True
    return y


def _takes_moments(x: Tensor, depthwise: bool) -> bool:
    """Whether covariances serve: see :mod:`mmdbb.branches.moments`."""
    if x.device.type != 'cpu':
        return False
    # Of one channel each a covariance is a variance.
    return depthwise or near_dtype(x.dtype) == x.dtype


def _collapses(branch: nn.Module, x: Tensor) -> bool:
    """Whether a branch is a 1x1, norm, KxK that should be one kernel.

    Per channel in the middle, and per channel of the input, composing
    multiplies out x taps times; it saves the 1x1, a product per pixel. Four
    times that, because products of kernels run slower than convolutions.
    """
    if not _is_a(branch, PointwiseKxK):
        return False
    spec = branch.spec
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    work = 4 * spec.out_channels // spec.groups * taps
    # Processes that share statistics must all go one way, whatever the size
    # of their own images.
    pixels = 5000 if synchronizes(branch.norm1) else pixels_of(x)
    return work <= pixels


def _is_a(branch: nn.Module, kind: type) -> bool:
    """Whether a branch computes what a branch of this kind does."""
    return isinstance(branch, kind) and type(branch).forward is kind.forward


def _training_branch(branch: nn.Module, batch: _Batch) -> Tensor:
    """Compute one branch: the table at the head of this file."""
    spec, x, stats = branch.spec, batch.half, batch.stats
    known = isinstance(stats, Moments)
    if _is_a(branch, PointwiseKxK):
        if stats is not None and _collapses(branch, x):
            return _collapsed(branch, batch)
        y = norm_then_pad(branch.norm1, branch.conv1(x), spec, batch.border)
        return run_norm(branch.norm2, branch.conv2(y))
    if _is_a(branch, PointwiseAvg):
        if spec.is_depthwise:
            return run_norm(branch.norm2, pool_sum(batch.x, spec, mean=True))
        if known:
            return _pooled_first(branch, batch)
        return _avg_again(branch, batch)
    if _is_a(branch, Pointwise) and branch.norm is not None:
        if known and not spec.is_depthwise and _reads_all(spec):
            return _pointwise(branch, x, stats)
        # Cheap to compute, or beside what is computed again anyway.
        if stats is not None or 4 * spec.in_channels <= spec.out_channels:
            return again(lambda b, x: b(x), x, module=branch)
    return branch(batch.x if isinstance(branch, Identity) else x)


def _reads_all(spec: ConvSpec) -> bool:
    """Whether a 1x1 of this geometry reads each pixel, and nothing else."""
    return spec.stride == (1, 1) and not any(spec.pads_of((1, 1)))


def _pointwise(branch: Pointwise, x: Tensor, moments: Moments) -> Tensor:
    with without_autocast(x.device):
        weight = branch.conv.weight
        scale, shift = batch_scale_shift(branch.norm, moments.through(weight))
        exact = _scaled(weight.to(scale.dtype), scale)
        kernel = exact.to(x.dtype)
        # A norm centres what the rounded kernel makes.
        shift = shift + moments.mean_through(exact - kernel)
        z = F.conv2d(x, kernel, groups=branch.spec.groups)
        return add_shift(z, shift.reshape(-1, 1, 1))


def _collapsed(branch: PointwiseKxK, batch: _Batch) -> Tensor:
    spec, x, kernel1 = branch.spec, batch.half, branch.kernel1
    near = near_dtype(x.dtype)
    with without_autocast(x.device):
        stats = batch.stats.through(kernel1)
        scale, shift = batch_scale_shift(branch.norm1, stats)
        first = _scaled(kernel1.to(scale.dtype), scale).to(near)
        shift, kernel2 = shift.to(near), branch.conv2.weight.to(near)
        kernel = again(
            lambda *kernels: compose_1x1_kxk(*kernels, spec.groups),
            first,
            kernel2,
        )
        # Padded with zeros the border has the constant of the inside.
        constant = mask_kernel(kernel2, shift, spec.groups)
        constant = constant.sum((1, 2, 3)).reshape(-1, 1, 1)
        if spec.has_border:
            value = batch.border(branch.norm1, stats.mean.detach)
            constant = constant + F.conv2d(
                border_mask(x, spec.pads).to(near),
                mask_kernel(kernel2, value.to(near) - shift, spec.groups),
                stride=spec.stride,
                dilation=spec.dilation,
            )
        z = add_shift(convolve(x, kernel, None, spec), constant)
    return run_norm(branch.norm2, z)


def _pooled_first(branch: PointwiseAvg, batch: _Batch) -> Tensor:
    spec, x, weight = branch.spec, batch.half, branch.conv1.weight
    area = spec.kernel_size[0] * spec.kernel_size[1]
    with without_autocast(x.device):
        stats = batch.stats.through(weight)
        scale, shift = batch_scale_shift(branch.norm1, stats)
        exact = _scaled(weight.to(scale.dtype), scale) / area
        kernel = exact.to(x.dtype)
        # A norm centres what the rounded kernel makes.
        shift = shift + batch.stats.mean_through(exact - kernel) * area
        shift = shift.to(near_dtype(x.dtype))
        value = shift
        if spec.has_border:
            value = batch.border(branch.norm1, stats.mean.detach)

        def pooled(
            norm: nn.Module, x: Tensor, kernel: Tensor, shift: Tensor
        ) -> Tensor:
            q = pool_sum(x, spec)
            z = F.conv2d(q, kernel, groups=spec.groups)
            constant = shift.reshape(-1, 1, 1)
            if spec.has_border:
                border = border_mask(x, spec.pads).to(shift.dtype)
                b = pool_sum(border, spec, padded=True) / area
                constant = constant + (value.reshape(-1, 1, 1) - constant) * b
            return run_norm(norm, add_shift(z, constant))

        return again(pooled, x, kernel, shift, module=branch.norm2)


def _avg_again(branch: PointwiseAvg, batch: _Batch) -> Tensor:
    """The branch as it is, computed again with the border it had."""

    def averaged(branch: nn.Module, x: Tensor) -> Tensor:
        z = branch.conv1(x)
        y = norm_then_pad(branch.norm1, z, branch.spec, batch.border)
        y = pool_sum(y, branch.spec, padded=True, mean=True)
        return run_norm(branch.norm2, y)

    return again(averaged, batch.half, module=branch)


# ----------------------------------------------------------------- helpers


def pool_sum(
    x: Tensor, spec: ConvSpec, padded: bool = False, mean: bool = False
) -> Tensor:
    """The sum over each window of the spec's geometry.

    On a CPU a depthwise convolution is several times faster than torch's own
    pooling; its kernel of ones is exact in half precision too.

    Args:
        x: Images of shape (N, C, H, W).
        spec: The geometry; padding counts as pixels.
        padded: Whether ``x`` is padded already.
        mean: Whether to divide by the window's area.
    """
    channels, padding = x.shape[1], spec.padding
    if padded:
        padding = 0
    elif padding == 'same' or spec.padding_mode != 'zeros':
        x, padding = pad2d(x, spec.pads, spec.padding_mode), 0
    dtype, area = x.dtype, spec.kernel_size[0] * spec.kernel_size[1]
    if mean:  # rounded once, as torch's own
        x = x.to(near_dtype(dtype))
    ones = x.new_ones(channels, 1, *spec.kernel_size)
    with without_autocast(x.device):
        y = F.conv2d(
            x, ones, None, spec.stride, padding, spec.dilation, channels
        )
    return y.div_(area).to(dtype) if mean else y


def _scaled(kernel: Tensor, scale: Tensor) -> Tensor:
    return kernel * scale.reshape(-1, 1, 1, 1)
