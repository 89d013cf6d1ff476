# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""The fast forward pass of a branch sum: same arithmetic, less work.

Outputs, gradients and running statistics are those of
:meth:`BranchSumConv2d.forward_branches`; only the way there differs. Without
this file the package is slower and as correct.

*Norms in eval mode.* The block is one convolution, so compose its kernel and
run that. The border that the papers' code pads with a detached value keeps
its missing gradient: a term is added that is zero, but whose gradient is not.

*Pointwise maps.* With :math:`\mu` and :math:`\Sigma` the mean and covariance
of a batch's pixels x, the batch statistics of z = P x are :math:`P \mu` and
:math:`\mathrm{diag}(P \Sigma P^T)`: known before z is computed, and z itself
is never kept. One covariance serves all 1x1 convolutions of a block.

*1x1, norm, KxK.* Its first norm's scale a and shift c follow from that, so
the sequence collapses to one kernel :math:`W_2 \circ (a W_1)` on x, plus what
the KxK makes of an image of constants: c inside, the pad value v on the
border.

*1x1, norm, average.* Pooling commutes with a 1x1: with q the zero-padded
pooling of x and m that of an image of ones, what the second norm reads is
a P q + c m + v (1 - m). It is computed again in the backward pass instead of
being kept.

*Small maps*, where a covariance costs more than it saves: a border padded with
v is the zero-padded border of an image less v, plus what the KxK or the
pooling makes of v everywhere, one constant a channel. So nothing is copied.

*Depthwise blocks* cost little to compute and much to keep: they are computed
again in the backward pass as a whole.
"""

from __future__ import annotations

import functools
import logging
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmdbb.blocks.kept import kept_kernel
from mmdbb.branches.norm import (
    is_compiling,
    norm_scale_shift,
    run_norm,
    update_running_stats,
)
from mmdbb.branches.pointwise import Pointwise
from mmdbb.branches.pointwise_avg import PointwiseAvg
from mmdbb.branches.pointwise_kxk import PointwiseKxK
from mmdbb.geometry import ConvSpec, border_mask, convolve, pad2d
from mmdbb.transforms import (
    KernelBias,
    ScaleShift,
    avg_pool_kernel,
    bn_scale_shift,
    fuse_1x1_kxk,
)

# ---------------------------------------------------------------- dispatch


def fast_forward(block: nn.Module, x: Tensor) -> Tensor:
    """What ``block.forward_branches(x)`` gives, by the cheapest way known.

    Args:
        block: A ``BranchSumConv2d`` that is not merged.
        x: Images of shape (N, in, H, W).

    Returns:
        Tensor: Shape (N, out, H', W').
    """
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    modes = {norm.training for norm in norms}
    if not is_compiling() and _has_sync_bn(norms):
        _say_once(
            f'{type(block).__name__} with SyncBN computes its branches one '
            'by one: statistics over all processes are not known before'
        )
    if len(modes) == 1 and _is_plain(block, norms, x):
        if modes == {False}:
            return _frozen_forward(block, x)
        if _batch_pixels(block.spec, x) > 1:
            return _training_forward(block, x)
    return block.forward_branches(x)


def _is_plain(block: nn.Module, norms: List[_BatchNorm], x: Tensor) -> bool:
    """Whether nothing watches or changes what happens inside the branches.

    Half precision is left to the literal sum: covariances need more digits.
    """
    return (
        x.dtype in (torch.float32, torch.float64)
        and not x.is_meta
        and (is_compiling() or not torch.jit.is_tracing())
        and not _autocast_is_on(x)
        and all(p.dtype == x.dtype for p in block.parameters())
        and not _has_sync_bn(norms)
        and not any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
            for m in block.branches.modules()
        )
    )


def _has_sync_bn(norms: List[_BatchNorm]) -> bool:
    return any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger('mmdbb').debug(message)


def _autocast_is_on(x: Tensor) -> bool:
    try:
        return torch.is_autocast_enabled(x.device.type)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def _batch_pixels(spec: ConvSpec, x: Tensor) -> int:
    """Values a channel in the block's output."""
    top, bottom, left, right = spec.pads
    size = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
    count = x.shape[0]
    for n, k, d, s in zip(size, spec.kernel_size, spec.dilation, spec.stride):
        count *= (n - d * (k - 1) - 1) // s + 1
    return count


def _composing_pays(spec: ConvSpec, x: Tensor, saves_kxk: bool) -> bool:
    """Whether composing a 1x1 and a KxK costs less than what it saves.

    Per channel in the middle, and per channel of the input, composing
    multiplies out x taps times. It saves the 1x1, a product per pixel, and if
    the KxK runs in any case for the other branches, that too.
    """
    pixels = _count(x)
    if saves_kxk:
        return spec.in_channels // spec.groups <= pixels
    # Twice, because small products of kernels run slower than convolutions.
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    return 2 * spec.out_channels // spec.groups * taps <= pixels


# ------------------------------------------------------ norms in eval mode


def _frozen_forward(block: nn.Module, x: Tensor) -> Tensor:
    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, *block.parameters())
    )
    after = None if block.norm is None else norm_scale_shift(block.norm).scale
    if not needs_grad and x.device.type == 'cpu' and not is_compiling():
        kernel, bias = kept_kernel(block)
    elif _composing_pays(block.spec, x, saves_kxk=True):
        kernel, bias = block.get_equivalent_kernel_bias()
    else:
        return block.forward_branches(x)
    y = convolve(x, kernel, bias, block.spec)
    if needs_grad:
        for branch in block.branches.values():
            y = _without_border_gradient(y, branch, x, after)
    return y


def _without_border_gradient(
    y: Tensor, branch: nn.Module, x: Tensor, after: Optional[Tensor]
) -> Tensor:
    """Add zero, with the gradient that the detached border must not have.

    Args:
        y: The block's output.
        branch: One of its branches.
        x: The block's input.
        after: Scale (out,) of the norm after the sum, if there is one.
    """
    spec = branch.spec
    norm = getattr(branch, 'norm1', None)
    if (
        norm is None
        or not _has_border(spec)
        or not any(p.requires_grad for p in norm.parameters())
    ):
        return y
    shift = norm_scale_shift(norm).shift
    nothing = shift.detach() - shift
    border = border_mask(x, spec.pads).to(x.dtype)
    last = norm_scale_shift(branch.last_norm).scale
    if isinstance(branch, PointwiseKxK):
        kernel = _mask_kernel(branch, nothing)
        kernel = _scaled(kernel, last)
    else:
        area = spec.kernel_size[0] * spec.kernel_size[1]
        kernel = (last * nothing / area).reshape(-1, 1, 1, 1)
        kernel = kernel.expand(-1, -1, *spec.kernel_size)
    if after is not None:
        kernel = _scaled(kernel, after)
    return y + F.conv2d(
        border, kernel, stride=spec.stride, dilation=spec.dilation
    )


# -------------------------------------------------- norms in training mode


def _training_forward(block: nn.Module, x: Tensor) -> Tensor:
    if block.spec.is_depthwise:
        return _again_in_backward(_training_sum, block, x)
    return _training_sum(block, x)


def _training_sum(block: nn.Module, x: Tensor) -> Tensor:
    moments = None
    if any(_collapses(branch, x) for branch in block.branches.values()):
        moments = moments_of(x, block.spec.groups)
    y = None
    for branch in block.branches.values():
        z = _training_branch(branch, x, moments)
        if y is None:
            y = z
            # An identity without a norm gives the input or a part of it.
            is_new = branch.last_norm is not None
        else:
            y = y.add_(z) if is_new else y + z
            is_new = True
    if block.bias is not None:
        y = y + block.bias.reshape(-1, 1, 1)
    return y if block.norm is None else run_norm(block.norm, y)


def _collapses(branch: nn.Module, x: Tensor) -> bool:
    """Whether a branch is a 1x1, norm, KxK that should be one kernel."""
    return isinstance(branch, PointwiseKxK) and _composing_pays(
        branch.spec, x, saves_kxk=False
    )


def _training_branch(
    branch: nn.Module, x: Tensor, moments: Optional[Moments]
) -> Tensor:
    spec = branch.spec
    if isinstance(branch, PointwiseKxK):
        if _collapses(branch, x):
            return _pointwise_kxk(branch, x, moments)
        if spec.padding_mode == 'zeros':
            return _shifted_kxk(branch, x)
    if isinstance(branch, PointwiseAvg):
        if spec.is_depthwise:
            return run_norm(branch.norm2, avg_pool(x, spec))
        if moments is not None:
            return _pointwise_avg(branch, x, moments)
        if spec.padding_mode == 'zeros':
            return _again_in_backward(_shifted_avg, branch, x)
    if isinstance(branch, Pointwise) and branch.norm is not None:
        pixels = _pixels_of(spec, x)
        if pixels is x and moments is not None and not spec.is_depthwise:
            return _pointwise(branch, x, moments)
        # A covariance of few channels costs less than a norm of many.
        if 4 * spec.in_channels <= spec.out_channels:
            return _pointwise(branch, pixels, moments_of(pixels, spec.groups))
    return branch(x)


def _pixels_of(spec: ConvSpec, x: Tensor) -> Tensor:
    """The pixels that a 1x1 reads: x itself where those are all."""
    pixels = pad2d(x, spec.pads_of((1, 1)), spec.padding_mode)
    if spec.stride != (1, 1):
        down, right = spec.stride
        pixels = pixels[..., ::down, ::right].contiguous()
    return pixels


def _pointwise(branch: Pointwise, x: Tensor, moments: Moments) -> Tensor:
    weight = branch.conv.weight
    mean, var = moments.through(weight)
    scale, shift = _batch_norm(branch.norm, mean, var, _count(x))
    groups = branch.spec.groups
    return F.conv2d(x, _scaled(weight, scale), shift, groups=groups)


def _pointwise_kxk(
    branch: PointwiseKxK, x: Tensor, moments: Moments
) -> Tensor:
    spec, kernel1, kernel2 = branch.spec, branch.kernel1, branch.conv2.weight
    mean, var = moments.through(kernel1)
    scale, shift = _batch_norm(branch.norm1, mean, var, _count(x))
    kernel, bias = fuse_1x1_kxk(
        KernelBias(_scaled(kernel1, scale), shift),
        KernelBias(kernel2, kernel2.new_zeros(spec.out_channels)),
        spec.groups,
    )
    if not _has_border(spec):
        return run_norm(branch.norm2, convolve(x, kernel, bias, spec))
    # What the KxK makes of the constants, c inside and v on the border.
    value = norm_scale_shift(branch.norm1).shift.detach()
    border = border_mask(x, spec.pads).to(x.dtype)
    constants = F.conv2d(
        torch.cat([1 - border, border], 1),
        torch.cat([_mask_kernel(branch, c) for c in (shift, value)], 1),
        stride=spec.stride,
        dilation=spec.dilation,
    )
    return run_norm(
        branch.norm2, convolve(x, kernel, None, spec).add_(constants)
    )


def _shifted_kxk(branch: PointwiseKxK, x: Tensor) -> Tensor:
    """The branch without a padded copy: less v, pad with zeros, add W v."""
    z, value = _less_border(branch.norm1, branch.conv1(x))
    constant = _mask_kernel(branch, value).sum((1, 2, 3))
    z = convolve(z, branch.conv2.weight, constant, branch.spec)
    return run_norm(branch.norm2, z)


def _pointwise_avg(
    branch: PointwiseAvg, x: Tensor, moments: Moments
) -> Tensor:
    weight = branch.conv1.weight
    mean, var = moments.through(weight)
    scale, shift = _batch_norm(branch.norm1, mean, var, _count(x))
    return _again_in_backward(
        _map_pooled, branch, x, _scaled(weight, scale), shift
    )


def _map_pooled(
    branch: PointwiseAvg, x: Tensor, weight: Tensor, c: Tensor
) -> Tensor:
    """Norm2 of P q + c m + v (1 - m), for P scaled by the first norm."""
    spec, border = branch.spec, _has_border(branch.spec)
    value = norm_scale_shift(branch.norm1).shift.detach() if border else c
    q = avg_pool(x, spec)
    z = F.conv2d(q, weight, value, groups=spec.groups)
    if border:
        inside = (~border_mask(x, spec.pads)).to(x.dtype)
        m = avg_pool(inside, spec, padded=True)
        z = z.add_((c - value).reshape(-1, 1, 1) * m)
    return run_norm(branch.norm2, z)


def _shifted_avg(branch: PointwiseAvg, x: Tensor) -> Tensor:
    """The branch without a padded copy: less v, pad with zeros, add v."""
    z, value = _less_border(branch.norm1, branch.conv1(x))
    z = avg_pool(z, branch.spec).add_(value.reshape(-1, 1, 1))
    return run_norm(branch.norm2, z)


def _less_border(norm: _BatchNorm, x: Tensor) -> Tuple[Tensor, Tensor]:
    """A norm's output less its value v on the border, and v (channels,)."""
    z = run_norm(norm, x)
    value = norm_scale_shift(norm).shift.detach()
    # In place: a batch norm's backward pass needs its input alone.
    return z.sub_(value.reshape(-1, 1, 1)), value


def _batch_norm(
    norm: _BatchNorm, mean: Tensor, var: Tensor, count: int
) -> ScaleShift:
    """A norm in training mode as scale and shift, from batch statistics."""
    update_running_stats(norm, mean.detach(), var.detach(), count)
    return bn_scale_shift(mean, var, norm.weight, norm.bias, norm.eps)


# -------------------------------------------------------------- statistics


class Moments(NamedTuple):
    """Mean and covariance of a batch's pixels, group by group.

    Attributes:
        mean: Shape (groups, c) for c channels a group.
        cov: Shape (groups, c, c), biased.
    """

    mean: Tensor
    cov: Tensor

    def through(self, weight: Tensor) -> Tuple[Tensor, Tensor]:
        """Mean and variance, both (out,), after a 1x1 kernel.

        Args:
            weight: Shape (out, c, 1, 1).
        """
        groups, c = self.mean.shape
        rows = weight.reshape(groups, -1, c)
        var = (torch.matmul(rows, self.cov) * rows).sum(-1)
        return _map(weight, self.mean), var.reshape(-1).clamp_min(0)


def _map(weight: Tensor, pixel: Tensor) -> Tensor:
    """A 1x1 kernel (out, c, 1, 1) on one pixel (groups, c): (out,)."""
    rows = weight.reshape(*pixel.shape[:1], -1, pixel.shape[1])
    return torch.matmul(rows, pixel[..., None]).reshape(-1)


def moments_of(x: Tensor, groups: int) -> Moments:
    """Mean and covariance of a batch's pixels, differentiable.

    Args:
        x: Images of shape (N, C, H, W).
        groups: Channels are taken in this many groups.
    """
    return Moments(*_MomentsOf.apply(x, groups))


class _MomentsOf(torch.autograd.Function):
    """Keeps its input alone; backward is one 1x1 convolution."""

    @staticmethod
    def forward(ctx, x, groups):
        count = _count(x)
        mean = x.mean((0, 2, 3))
        # Centred first: a difference of large squares would lose digits.
        pixels = x - mean.reshape(-1, 1, 1)
        area, width = x.shape[2] * x.shape[3], x.shape[1] // groups
        if not pixels.is_contiguous():  # channels last: no copy needed
            pixels = pixels.permute(0, 2, 3, 1).reshape(1, count, groups, -1)
            pixels = pixels.permute(0, 2, 3, 1)
        elif area >= width:
            pixels = pixels.reshape(-1, groups, width, area)
        else:  # one product, not one a small image
            pixels = pixels.transpose(0, 1).reshape(1, groups, width, count)
        mean = mean.reshape(groups, -1)
        cov = torch.matmul(pixels, pixels.transpose(-1, -2)).sum(0) / count
        ctx.save_for_backward(x, mean)
        ctx.groups = groups
        return mean, cov

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_mean, grad_cov):
        x, mean = ctx.saved_tensors
        # d cov = (x - mean) (dx)^T + its transpose, over the pixels.
        weight = (grad_cov + grad_cov.transpose(-1, -2)) / _count(x)
        shift = grad_mean / _count(x) - torch.matmul(
            weight, mean[..., None]
        ).squeeze(-1)
        weight = weight.reshape(x.shape[1], -1, 1, 1)
        shift = shift.reshape(-1, 1, 1)
        if weight.shape[1] == 1:  # a channel each
            return (x * weight[:, 0]).add_(shift), None
        # Not as the convolution's bias, which torch.compile cannot lower.
        return F.conv2d(x, weight, groups=ctx.groups).add_(shift), None


# ----------------------------------------------------------------- helpers


def avg_pool(x: Tensor, spec: ConvSpec, padded: bool = False) -> Tensor:
    """Average pooling with the spec's geometry; padding counts as pixels.

    On a CPU a depthwise convolution is several times faster than torch's own
    pooling.

    Args:
        x: Images of shape (N, C, H, W).
        spec: The geometry.
        padded: Whether ``x`` is padded already.
    """
    channels = x.shape[1]
    padding = spec.padding
    if padded:
        padding = 0
    elif padding == 'same' or spec.padding_mode != 'zeros':
        x, padding = pad2d(x, spec.pads, spec.padding_mode), 0
    kernel = avg_pool_kernel(
        channels, spec.kernel_size, channels, x.dtype, x.device
    )
    return F.conv2d(
        x, kernel, None, spec.stride, padding, spec.dilation, channels
    )


def _mask_kernel(branch: PointwiseKxK, value: Tensor) -> Tensor:
    """Kernel (out, 1, kH, kW) by which the KxK reads a mask of ``value``."""
    spec, kernel = branch.spec, branch.conv2.weight
    inner = kernel.shape[1]
    rows = kernel.reshape(spec.groups, -1, inner, *kernel.shape[2:])
    rows = torch.einsum(
        'gomhw,gm->gohw', rows, value.reshape(spec.groups, inner)
    )
    return rows.reshape(-1, 1, *kernel.shape[2:])


def _again_in_backward(function: Callable, *args):
    """Run a function whose inside is computed again, not kept."""
    if not torch.is_grad_enabled() or is_compiling():
        return function(*args)
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False
    )


def _has_border(spec: ConvSpec) -> bool:
    return spec.padding_mode == 'zeros' and any(spec.pads)


def _scaled(kernel: Tensor, scale: Tensor) -> Tensor:
    return kernel * scale.reshape(-1, 1, 1, 1)


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]
