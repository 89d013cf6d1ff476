# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""Statistics of a batch, before and after a 1x1 convolution.

Let :math:`\mu` and :math:`\Sigma` be the mean and covariance of a batch's
pixels x. Then z = P x has mean :math:`P \mu` and variances
:math:`\mathrm{diag}(P \Sigma P^T)`, which are known before z is computed. One
covariance serves all 1x1 convolutions of a block.

*Digits.* If a row of P takes the difference of nearly equal channels, z is
smaller than its terms by a factor
:math:`\kappa = \sum_i |P_i| \sigma_i / \sigma_z`. Rounding then gives z a
relative error of :math:`\kappa \epsilon`, but a variance computed from
:math:`\Sigma` one of :math:`\kappa^2 \epsilon`. So :math:`\Sigma` is computed
in double precision.

*Devices.* Few GPUs are fast in double precision. On GPUs, and for
half-precision images, z is computed, its statistics are taken, and z is
dropped (:class:`Maps`). Depthwise blocks on a CPU are an exception: there a
covariance is just the variance of one channel.

*Processes.* With SyncBN, counts, means and covariances are summed over the
processes in one all-reduce, in double precision.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.dimensions import CONV
from mmdbb.recompute import again, is_compiling, without_autocast

# How many numbers are held in the wider precision at once; they should fit
# into a core's cache.
_AT_ONCE = 1 << 18


class BatchStats(NamedTuple):
    """Mean and variance of a batch's pixels, channel by channel.

    Attributes:
        mean: Mean of each channel, shape (channels,).
        var: Biased variance of each channel, shape (channels,).
        count: Number of pixels in the batch, over all processes that share
            it.
    """

    mean: Tensor
    var: Tensor
    # A tuple has a method of this name, which nobody calls.
    count: Union[int, Tensor]  # type: ignore[assignment]

    def about_zero(self) -> BatchStats:
        """The same with the mean taken as zero: ``var`` is the mean square."""
        square = self.var + self.mean.square()
        return self._replace(mean=torch.zeros_like(self.mean), var=square)


class Moments(NamedTuple):
    """Mean and covariance of a batch's pixels, group by group.

    Attributes:
        mean: Mean of each channel, shape (groups, c) for c channels per
            group.
        cov: Biased covariance within each group, shape (groups, c, c).
        count: Number of pixels in the batch, over all processes that share
            it.
    """

    mean: Tensor
    cov: Tensor
    # A tuple has a method of this name, which nobody calls.
    count: Union[int, Tensor]  # type: ignore[assignment]

    def through(self, kernel: Tensor) -> BatchStats:
        """Statistics of the output of a 1x1 convolution.

        Args:
            kernel: Its kernel, shape (out, c, 1, 1).
        """
        rows = self._rows(kernel)
        var = (torch.matmul(rows, self.cov) * rows).sum(-1)
        var = var.reshape(-1).clamp_min(0)
        return BatchStats(self.mean_through(kernel), var, self.count)

    def mean_through(self, kernel: Tensor) -> Tensor:
        """Mean of the output of a 1x1 convolution, shape (out,).

        Args:
            kernel: Its kernel, shape (out, c, 1, 1).
        """
        mean = torch.matmul(self._rows(kernel), self.mean[..., None])
        return mean.reshape(-1)

    def _rows(self, kernel: Tensor) -> Tensor:
        groups, inner = self.mean.shape
        return kernel.to(self.cov.dtype).reshape(groups, -1, inner)


class Maps(NamedTuple):
    """A batch of images; statistics are taken from convolved maps.

    It stands in for :class:`Moments` where a covariance would be slow or too
    coarse. The maps are dropped once their statistics are known.

    Attributes:
        x: Images of shape (N, C, H, W).
        groups: Number of groups of the 1x1 convolutions.
        norm: The norm whose processes share the batch; None for no other
            process.
    """

    x: Tensor
    groups: int
    norm: Optional[_BatchNorm]

    def through(self, kernel: Tensor) -> BatchStats:
        """Statistics of the output of a 1x1 convolution.

        Args:
            kernel: Its kernel, shape (out, C / groups, 1, 1).
        """

        def statistics(x: Tensor, kernel: Tensor) -> Tensor:
            z = CONV[x.dim() - 2](x, kernel.to(x.dtype), groups=self.groups)
            z = z.to(near_dtype(x.dtype))
            over = (0, *range(2, z.dim()))
            var, mean = torch.var_mean(z, over, correction=0)
            return torch.stack([mean, var])

        with without_autocast(self.x.device):
            mean, var = again(statistics, self.x, kernel)
        found = Moments(mean[:, None], var[:, None, None], pixels_of(self.x))
        found = _over_processes(found, self.norm)
        return BatchStats(found.mean[:, 0], found.cov[:, 0, 0], found.count)


def moments_of(
    x: Tensor, groups: int, norm: Optional[_BatchNorm] = None
) -> Moments:
    """Compute mean and covariance of a batch's pixels, differentiable twice.

    Args:
        x: Images of shape (N, C, H, W).
        groups: Number of groups that channels are split into.
        norm: The norm whose processes share the batch; None for no other
            process.
    """
    if x.dim() != 4:
        x = x.flatten(2)[..., None]  # as pictures; statistics know no places
    with without_autocast(x.device):
        mean, cov = _MomentsOf.apply(x, groups)
        found = Moments(mean, cov, pixels_of(x))
        return _over_processes(found, norm)


def stats_of(x: Tensor, norm: Optional[_BatchNorm] = None) -> BatchStats:
    """Compute mean and variance of a batch's pixels, differentiable twice.

    Args:
        x: Images of shape (N, C, H, W).
        norm: The norm whose processes share the batch; None for no other
            process.
    """
    found = moments_of(x, x.shape[1], norm)
    return BatchStats(found.mean[:, 0], found.cov[:, 0, 0], found.count)


def pixels_of(x: Tensor) -> int:
    """Number of pixels in images (N, C, H, W), over the whole batch."""
    return x.shape[0] * math.prod(x.shape[2:])


def near_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a norm computes in: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The next wider dtype: float32 for half precision, else float64."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else torch.float64


# -------------------------------------------------------------- one process


class _MomentsOf(torch.autograd.Function):
    """Mean and covariance. Autograd keeps nothing but the images and the mean.

    The backward pass is one 1x1 convolution.
    """

    @staticmethod
    def forward(ctx, x, groups):
        wide, count = wide_dtype(x.dtype), max(pixels_of(x), 1)
        # Centre the pixels first: a difference of large squares would lose
        # digits. The mean in float32 is rounded; `rest`, the mean of the
        # centred pixels, corrects that below.
        near = near_dtype(x.dtype)
        centre = x.mean((0, 2, 3), dtype=near).reshape(-1, 1, 1)
        rest: Any = 0
        cov: Any = 0
        for images in _in_parts(x):
            pixels = _in_rows((images - centre).to(wide), groups)
            rest = rest + pixels.sum((0, -1))
            product = torch.matmul(pixels, pixels.transpose(-1, -2))
            cov = cov + product.sum(0)
        rest = rest / count
        cov = cov / count - rest[..., None] * rest[..., None, :]
        mean = centre.to(wide).reshape(groups, -1) + rest
        ctx.save_for_backward(x, mean)
        ctx.groups = groups
        return mean, cov

    @staticmethod
    def backward(ctx, grad_mean, grad_cov):
        x, mean = ctx.saved_tensors
        count = max(pixels_of(x), 1)
        # d cov = (x - mean) (dx)^T + its transpose, over the pixels.
        kernel = (grad_cov + grad_cov.transpose(-1, -2)) / count
        kernel = kernel.reshape(x.shape[1], -1, 1, 1).to(x.dtype)
        near = near_dtype(x.dtype)
        pixels = (x - mean.to(near).reshape(-1, 1, 1)).to(x.dtype)
        shift = (grad_mean / count).to(x.dtype).reshape(-1, 1, 1)
        with without_autocast(x.device):
            if kernel.shape[1] == 1:  # one channel per group
                return pixels * kernel[:, 0] + shift, None
            # torch.compile cannot lower this shift as the convolution's bias.
            return F.conv2d(pixels, kernel, groups=ctx.groups) + shift, None


def _in_parts(x: Tensor) -> Tuple[Tensor, ...]:
    if is_compiling() or x.device.type != 'cpu' or not x.numel():
        return (x,)
    size = max(1, _AT_ONCE // x[0].numel())
    # Into as few parts as that allows, of nearly equal size.
    return x.chunk(-(-x.shape[0] // size))


def _in_rows(x: Tensor, groups: int) -> Tensor:
    """Reshape (n, C, h, w) to (m, groups, C / groups, pixels)."""
    many, channels, height, width = x.shape
    area, inner = height * width, channels // groups
    if not x.is_contiguous():  # channels last: no copy needed
        rows = x.permute(0, 2, 3, 1).reshape(1, many * area, groups, inner)
        return rows.permute(0, 2, 3, 1)
    if area >= inner:
        return x.reshape(many, groups, inner, area)
    # Small images: one product for all of them, not one for each.
    return x.transpose(0, 1).reshape(1, groups, inner, many * area)


# ----------------------------------------------------------- many processes


def synchronizes(norm: Optional[nn.Module]) -> bool:
    """Whether a norm now shares its batch with other processes (SyncBN)."""
    own: Any = norm
    return (
        (
            isinstance(norm, nn.SyncBatchNorm)
            or getattr(norm, 'synchronized', False)
        )
        and own.training
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(own.process_group) > 1
    )


class _Sum(torch.autograd.Function):
    """Sum over processes, differentiable. torch's own is deprecated."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None


def _over_processes(moments: Moments, norm: Optional[_BatchNorm]) -> Moments:
    """Combine the moments of all processes of a norm, differentiably."""
    if not synchronizes(norm):
        return moments
    own: Any = norm
    mean, cov = moments.mean.double(), moments.cov.double()
    second = cov + mean[..., None] * mean[..., None, :]
    sums = torch.cat(
        [
            mean.new_ones(1),
            mean.reshape(-1),
            second.reshape(-1),
        ]
    )
    sums = _Sum.apply(sums * moments.count, own.process_group)
    count = sums[0].detach()
    mean_, second_ = (sums[1:] / count).split([mean.numel(), cov.numel()])
    mean_, second_ = mean_.reshape(mean.shape), second_.reshape(cov.shape)
    cov_ = second_ - mean_[..., None] * mean_[..., None, :]
    wide = moments.cov.dtype
    return Moments(mean_.to(wide), cov_.to(wide), count)
